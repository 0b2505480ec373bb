// Training samples: their cards, which of them are ticked, the list of the most harmful, and a window for one.

const ticked = new Set();
const shownAtOnce = 48;
let listedShown = shownAtOnce, listedTurn = 0;

/** Cards of training samples: what each looks like, its score, label and id, and a box to tick. */
async function cards(numbers, scores, largest) {
  const found = await Promise.all(numbers.map((number) => entry("training-looks", number)));
  return found.map((look, rank) => card(numbers[rank], scores[rank], largest, look));
}

function card(number, score, largest, look) {
  const id = training.id[number], label = named(training.label?.[number]);
  const what = `training sample ${id}` + (label === null ? "" : `, label ${label}`);
  const box = make("input", { type: "checkbox", "aria-label": `Tick ${what}`, "data-id": id, change: (event) => tick(id, event.target.checked) });
  box.checked = ticked.has(id);
  return make("div", { class: "picture" in look ? "card" : "card as-row", "data-id": id },
    make("button", { type: "button", class: "open", title: "More about it", click: () => openSample(number) }, looks(look, what)),
    make("div", { class: "caption" },
      scored(score, largest),
      make("span", { class: "labels" }, ...labels(training, number)),
      make("label", { class: "id" }, box, ` ${id}`)));
}

/** Tick or untick an id, wherever it is shown. */
function tick(id, on) {
  on ? ticked.add(id) : ticked.delete(id);
  for (const box of document.querySelectorAll(`input[data-id="${id}"]`)) box.checked = on;
  tellTicked();
}

function tellTicked() {
  if (!byId("ticked")) return;
  byId("ticked").value = ticked.size ? `${ticked.size} ticked` : "none ticked";
  for (const name of ["save-json", "save-text"]) byId(name).disabled = !ticked.size;
  try {
    localStorage.setItem(`ticked ${head.key}`, JSON.stringify([...ticked]));
  } catch { /* the browser keeps nothing for files */ }
}

function rememberTicked() {
  try {
    const known = new Set(training.id);
    for (const id of JSON.parse(localStorage.getItem(`ticked ${head.key}`) ?? "[]")) if (known.has(id)) ticked.add(id);
  } catch { /* as above */ }
}

/** Give the ticked ids to the user as a file, in the order of ids. */
function save(kind) {
  const ids = [...ticked].sort((one, other) => one - other);
  const content = kind === "json"
    ? JSON.stringify({ training: head.training, tests: head.tests, results: head.key, ids }, null, 1) + "\n"
    : ids.join("\n") + "\n";
  const url = URL.createObjectURL(new Blob([content], { type: kind === "json" ? "application/json" : "text/plain" }));
  make("a", { href: url, download: `${head.training}-ids.${kind === "json" ? "json" : "txt"}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Numbers of the listed samples that the filters let through. */
function wantedListed() {
  const label = byId("listed-label").value, wrong = byId("listed-wrong").checked;
  return listed.filter((number) =>
    (label === "" || String(training.label[number]) === label) && (!wrong || training.right[number] === 0));
}

async function drawListed() {
  const all = wantedListed(), shown = all.slice(0, listedShown), largest = Math.abs(training.mean[listed[0]]);
  const turn = ++listedTurn;
  const found = await cards(shown, shown.map((number) => training.mean[number]), largest);
  if (turn !== listedTurn) return;
  byId("listed").replaceChildren(...(found.length ? found : [make("p", { class: "muted" }, "None of them.")]));
  byId("more").hidden = all.length <= listedShown;
}

function startListed() {
  if (!listed.length) return;
  fillLabels(byId("listed-label"), byId("listed-by-label"), listed.map((number) => training.label?.[number] ?? null));
  byId("listed-by-right").hidden = !training.right || !listed.some((number) => training.right[number] === 0);
  const again = () => { listedShown = shownAtOnce; drawListed(); };
  byId("listed-label").addEventListener("change", again);
  byId("listed-wrong").addEventListener("change", again);
  byId("more").addEventListener("click", () => { listedShown += 4 * shownAtOnce; drawListed(); });
  byId("tick-all").addEventListener("click", () => wantedListed().forEach((number) => tick(training.id[number], true)));
  byId("tick-none").addEventListener("click", () => [...ticked].forEach((id) => tick(id, false)));
  byId("save-json").addEventListener("click", () => save("json"));
  byId("save-text").addEventListener("click", () => save("text"));
  tellTicked();
}

/** Offer the labels that are there, with how often; nothing where labels are not a few whole numbers. */
function fillLabels(select, around, all) {
  const counts = new Map();
  for (const label of all) if (label !== null) counts.set(label, (counts.get(label) ?? 0) + 1);
  const few = counts.size > 1 && counts.size <= 1000 && [...counts.keys()].every(Number.isInteger);
  around.hidden = !few;
  if (!few) return;
  for (const [label, count] of [...counts].sort((one, other) => one[0] - other[0]))
    select.append(make("option", { value: label }, `${named(label)} (${count})`));
}

/** Show a training sample in a window: what it is, and the tests that it is among the first of. */
async function openSample(number) {
  const id = training.id[number], label = named(training.label?.[number]);
  const what = `training sample ${id}` + (label === null ? "" : `, label ${label}`);
  const [look, ranks] = await Promise.all([entry("training-looks", number), entries("ranks", tests.id.length)]);
  const sides = [["helpful", 0], ["harmful", 2]].map(([side, column]) => {
    const found = ranks.flatMap((of, test) => {
      const rank = of[column].indexOf(number);
      return rank < 0 ? [] : [{ test, score: of[column + 1][rank] }];
    }).sort((one, other) => Math.abs(other.score) - Math.abs(one.score));
    if (!found.length) return null;
    const links = found.slice(0, 12).map(({ test, score }) =>
      make("button", { type: "button", class: "link", click: () => { byId("sample").close(); openTest(test); } },
        `${tests.id[test]}`, make("span", { class: "muted" }, ` ${shortly(score, true)}`)));
    return make("p", {}, `Among the most ${side} of ${found.length} test${found.length > 1 ? "s" : ""}: `, ...links,
      found.length > links.length ? make("span", { class: "muted" }, ` and ${found.length - links.length} more`) : null);
  });
  const box = make("input", { type: "checkbox", "data-id": id, change: (event) => tick(id, event.target.checked) });
  box.checked = ticked.has(id);
  byId("sample").replaceChildren(
    make("h2", { id: "sample-title" }, `Training sample ${id}`),
    looks(look, what, "large"),
    make("p", { class: "labels" }, ...labels(training, number, true)),
    make("dl", { class: "numbers" },
      make("dt", {}, "score, averaged over the tests"), make("dd", {}, scored(training.mean[number], 0)),
      make("dt", {}, "training loss"), make("dd", {}, shortly(training.loss?.[number]))),
    ...sides.filter((side) => side !== null),
    make("form", { method: "dialog", class: "ends" }, make("label", {}, box, " tick it"), make("button", {}, "Close")));
  byId("sample").showModal();
}
