// Tests: the list, in which only rows that are seen exist, and the one that is chosen.

const rowHeight = 60;
let order = [], chosen = null, wanted = 0;

const sorts = {
  id: { says: "id", by: (number) => tests.id[number] },
  loss: { says: () => head.measure, by: (number) => tests.loss[number], most: true },
  share: { says: "concentration", by: (number) => tests.share[number], most: true },
};

function startTests() {
  fillLabels(byId("label"), byId("by-label"), tests.label ?? []);
  byId("by-right").hidden = !tests.right;
  for (const [name, sort] of Object.entries(sorts)) {
    if (name !== "id" && !tests[name]) continue;
    byId("sort").append(make("option", { value: name }, typeof sort.says === "function" ? sort.says() : sort.says));
  }
  byId("search").addEventListener("input", () => select());
  for (const name of ["label", "right"]) byId(name).addEventListener("change", () => select());
  byId("sort").addEventListener("change", () => select(true));
  byId("reverse").addEventListener("click", () => {
    byId("reverse").setAttribute("aria-pressed", byId("reverse").getAttribute("aria-pressed") !== "true");
    select(true);
  });
  byId("list").addEventListener("scroll", () => drawRows(), { passive: true });
  byId("list").addEventListener("keydown", listKeys);
  new ResizeObserver(() => drawRows()).observe(byId("list"));
}

/** Choose and sort the tests that the filters let through; open the first, or stay with the one that is open. */
async function select(first = false) {
  const search = byId("search").value.trim().toLowerCase(), turn = ++wanted;
  const label = byId("label").value, right = byId("right").value;
  const number = /^#?\d+$/.test(search) ? search.replace("#", "") : null;
  const all = search && number === null ? await entries("tests-looks", tests.id.length) : null;
  if (turn !== wanted) return;
  const found = tests.id.map((_, row) => row).filter((row) =>
    (label === "" || String(tests.label[row]) === label) &&
    (right === "" || String(tests.right[row]) === right) &&
    (!search || (number !== null ? String(tests.id[row]).startsWith(number) : says(all[row], row).includes(search))));
  const sort = sorts[byId("sort").value], way = (byId("reverse").getAttribute("aria-pressed") === "true" ? -1 : 1) * (sort.most ? -1 : 1);
  order = found.sort((one, other) => compare(sort.by(one), sort.by(other), way) || one - other);
  if (number !== null) order.sort((one, other) => (String(tests.id[other]) === number) - (String(tests.id[one]) === number));
  const count = tests.id.length;
  byId("count").textContent = order.length === count ? `${count} tests` : `${order.length} of ${count} tests`;
  byId("list").scrollTop = 0;
  drawRows();
  if (first || !order.includes(chosen)) openTest(order[0] ?? null);
}

/** Compare two numbers; those that are missing come last, whatever the way. */
function compare(one, other, way) {
  if (one === null || other === null) return (one === null) - (other === null);
  return way * (one - other);
}

/** All words of a test, to be searched. */
function says(look, row) {
  const words = [named(tests.label?.[row]), named(tests.prediction?.[row]), look.text, ...(look.names ?? []), ...(look.values ?? [])];
  return words.filter((word) => word !== null && word !== undefined).join("\n").toLowerCase();
}

function drawRows() {
  const list = byId("list"), rows = byId("rows");
  const first = Math.max(0, Math.floor(list.scrollTop / rowHeight) - 4);
  const last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + 4);
  rows.style.height = `${order.length * rowHeight}px`;
  const there = new Map([...rows.children].map((row) => [row.dataset.key, row]));
  rows.replaceChildren(...order.slice(first, last).map((number, offset) => {
    const place = first + offset, row = there.get(String(number)) ?? makeRow(number);
    row.style.top = `${place * rowHeight}px`;
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-setsize", order.length);
    row.setAttribute("aria-selected", number === chosen);
    return row;
  }));
  const active = order.indexOf(chosen);
  active >= first && active < last ? list.setAttribute("aria-activedescendant", `row-${chosen}`) : list.removeAttribute("aria-activedescendant");
}

function makeRow(number) {
  const row = make("div", { role: "option", class: "row", id: `row-${number}`, "data-key": number, click: () => openTest(number) });
  const words = make("div", { class: "words" },
    make("span", { class: "first" }, make("b", {}, tests.id[number]), ...labels(tests, number)),
    make("span", { class: "muted" }, tests.loss ? `${head.measure} ${shortly(tests.loss[number])}` : "",
      tests.share?.[number] != null ? ` · ${head.few} carry ${percent(tests.share[number])}` : ""));
  row.append(words);
  entry("tests-looks", number).then((look) => {
    if ("picture" in look) row.prepend(looks(look, `test ${tests.id[number]}`, "thumb"));
    else words.append(make("span", { class: "line" }, text(look.text ?? look.problem ?? look.values.join("  "))));
  });
  return row;
}

/** Scroll the list to the test that is chosen. */
function reveal() {
  const place = order.indexOf(chosen), list = byId("list");
  if (place < 0) return;
  if (place * rowHeight < list.scrollTop) list.scrollTop = place * rowHeight;
  else if ((place + 1) * rowHeight > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * rowHeight - list.clientHeight;
  drawRows();
}

/** Go some tests further in the list. */
function step(by) {
  if (!order.length) return;
  const place = order.indexOf(chosen);
  openTest(order[place < 0 ? 0 : Math.min(Math.max(place + by, 0), order.length - 1)]);
}

function listKeys(event) {
  const page = Math.max(1, Math.floor(byId("list").clientHeight / rowHeight) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -order.length, End: order.length };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  step(steps[event.key]);
}

/** Show a test with what helps and what harms it. */
async function openTest(number) {
  chosen = number;
  showView("tests");
  if (number === null) {
    byId("test").replaceChildren(make("p", { class: "muted" }, "No test fits the search and the filters."));
    return;
  }
  reveal();
  history.replaceState(null, "", `#test=${tests.id[number]}`);
  const [look, ranks] = await Promise.all([entry("tests-looks", number), entry("ranks", number)]);
  const [helpful, up, harmful, down] = ranks, label = named(tests.label?.[number]);
  const largest = Math.max(...[...up, ...down].map(Math.abs));
  const [helping, harming] = await Promise.all([cards(helpful, up, largest), cards(harmful, down, largest)]);
  if (chosen !== number) return;
  const what = `test ${tests.id[number]}` + (label === null ? "" : `, label ${label}`);
  const right = tests.right?.[number];
  const share = tests.share?.[number];
  byId("test").replaceChildren(
    make("div", { class: "of" },
      looks(look, what, "large"),
      make("div", { class: "about" },
        make("div", { class: "heading" },
          make("h2", {}, `Test ${tests.id[number]}`),
          make("span", { class: "spring" }),
          make("button", { type: "button", title: "Previous (k)", "aria-label": "Previous test", click: () => step(-1) }, "‹"),
          make("button", { type: "button", title: "Next (j)", "aria-label": "Next test", click: () => step(1) }, "›")),
        make("p", { class: "labels" }, ...labels(tests, number, true),
          right === 0 || right === 1 ? make("span", { class: right ? "verdict" : "verdict wrong" }, right ? "✓ right" : "✗ wrong") : null),
        make("p", { class: "muted" }, tests.loss ? `${head.measure} ${shortly(tests.loss[number])}` : "",
          share == null ? "" : ` · ${head.few} of ${head.ranks.toLocaleString("en")} training samples carry ${percent(share)} of the influence`))),
    ranking("Most helpful", "help", helping),
    ranking("Most harmful", "harm", harming));
}

function ranking(heading, kind, found) {
  return make("section", { class: "ranking", "aria-label": heading },
    make("h3", { class: kind }, heading),
    make("div", { class: "cards" }, ...found));
}
