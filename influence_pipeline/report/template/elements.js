// Elements. Whatever comes of data is set as text or as a property, never as HTML.

/** Make an element with attributes, listeners (functions) and children; children may be texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const byId = (id) => document.getElementById(id);

/** Text of data, whatever direction it is written in. */
const text = (value, kind = "") => make("bdi", { class: kind || null }, String(value));

/** Write a number with three digits, and its sign where that is asked for. */
function shortly(value, signed = false) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = size === 0 ? "0" : size >= 1e-3 && size < 1e5 ? String(Number(size.toPrecision(3))) : size.toExponential(2).replace("e+", "e");
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + digits.replace("e-", "e−");
}

const percent = (share) => `${Math.round(100 * share)} %`;

/** Write a label or a prediction: its name, where it has one. */
function named(number) {
  if (number === null || number === undefined) return null;
  return head.names[number] ?? (Number.isInteger(number) ? String(number) : shortly(number));
}

/** Say whether a score helps. */
const helps = (score) => score > 0 !== head.higherIsBetter && score !== 0;

/** What a sample looks like; `what` says in words what it is. */
function looks(look, what, kind = "") {
  if ("picture" in look) {
    const [width, height] = look.size;
    const image = make("img", { alt: `${what}, ${width} × ${height} pixels`, class: Math.max(width, height) <= 64 ? "small" : null, decoding: "async" });
    image.style.aspectRatio = `${width} / ${height}`;
    picture(look.picture).then((url) => (image.src = url));
    return make("div", { class: `look picture ${kind}` }, image);
  }
  if ("text" in look) return make("p", { class: `look text ${kind}`, dir: "auto" }, look.text);
  if ("problem" in look) return make("p", { class: `look problem ${kind}` }, text(look.problem));
  const cells = look.values.map((value, number) =>
    make("span", { class: "value" }, look.names.length ? text(look.names[number], "name") : null, text(value)));
  const more = look.more ? make("span", { class: "value muted" }, `and ${look.more} more`) : null;
  return make("div", { class: `look values ${kind}` }, ...cells, more);
}

/** Label and prediction of a sample; the latter where it differs, or where it is asked for. */
function labels(table, number, always = false) {
  const label = named(table.label?.[number]), prediction = named(table.prediction?.[number]), right = table.right?.[number];
  const parts = [];
  if (label !== null) parts.push(make("span", { class: "label" }, make("span", { class: "muted" }, "label "), text(label)));
  if (prediction !== null && (always || right !== 1)) {
    const kind = right === 0 ? "prediction wrong" : "prediction";
    parts.push(make("span", { class: kind }, make("span", { class: "muted" }, "predicted "), text(prediction)));
  }
  return parts;
}

/** A score with a bar as long as it is, against the largest beside it. */
function scored(score, largest) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span"));
  bar.firstChild.style.width = `${largest ? (100 * Math.abs(score)) / largest : 0}%`;
  const kind = score === 0 ? "score" : helps(score) ? "score help" : "score harm";
  return make("span", { class: kind }, make("span", {}, shortly(score, true)), bar);
}
