// The page: views, light and dark, keys, and the start.

const views = ["tests", "training", "scores"];
let listedDrawn = false;

function showView(name) {
  for (const view of views) {
    const tab = byId(`tab-${view}`), on = view === name;
    byId(`view-${view}`).hidden = !on;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
  }
  if (name === "training" && listed.length && !listedDrawn) {
    listedDrawn = true;
    drawListed();
  }
  if (name === "tests") drawRows();
}

const currentView = () => views.find((view) => !byId(`view-${view}`).hidden);

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("influence theme", theme);
  } catch { /* the browser keeps nothing for files */ }
}

function turnTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

function startTheme() {
  try {
    const theme = localStorage.getItem("influence theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch { /* as above */ }
  byId("theme").addEventListener("click", turnTheme);
}

/** Go some cards further among those that are shown. */
function stepCards(by) {
  const cards = [...byId("listed").querySelectorAll(".open")], place = cards.indexOf(document.activeElement?.closest(".card")?.querySelector(".open"));
  const next = cards[place < 0 ? 0 : Math.min(Math.max(place + by, 0), cards.length - 1)];
  next?.focus();
  next?.closest(".card").scrollIntoView({ block: "nearest" });
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest?.("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape" && field) return field.blur();
  if (field || document.querySelector("dialog[open]")) return;
  const by = { j: 1, k: -1 }[event.key];
  if (by && currentView() === "tests") step(by);
  else if (by && currentView() === "training") stepCards(by);
  else if (["1", "2", "3"].includes(event.key)) showView(views[event.key - 1]);
  else if (event.key === "/") {
    showView("tests");
    byId("search").focus();
    byId("search").select();
  } else if (event.key === "x") {
    const box = document.activeElement?.closest(".card")?.querySelector("input[type=checkbox]");
    if (box) tick(Number(box.dataset.id), !box.checked);
  } else if (event.key === "t") turnTheme();
  else if (event.key === "?") byId("keys").showModal();
  else return;
  event.preventDefault();
}

function startTabs() {
  views.forEach((view, number) => {
    byId(`tab-${view}`).addEventListener("click", () => showView(view));
    byId(`tab-${view}`).addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = views[(number + by + views.length) % views.length];
      showView(next);
      byId(`tab-${next}`).focus();
    });
  });
}

/** Open the test that the address names. */
function openNamed() {
  const id = /^#test=(\d+)$/.exec(location.hash)?.[1];
  const number = id === undefined ? -1 : tests.id.indexOf(Number(id));
  if (number >= 0 && number !== chosen) openTest(number);
}

async function start() {
  startTheme();
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for it: one of 2023 or later is needed");
  head = await block("head");
  [tests, training, listed] = await Promise.all(["tests-table", "training-table", "listed"].map(block));
  rememberTicked();
  startTabs();
  startTests();
  startListed();
  document.addEventListener("keydown", keys);
  byId("keys-open").addEventListener("click", () => byId("keys").showModal());
  for (const dialog of document.querySelectorAll("dialog"))
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  window.addEventListener("hashchange", openNamed);
  const named = location.hash;
  await select();
  if (named) {
    history.replaceState(null, "", named);
    openNamed();
  }
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("notice").hidden = false;
  byId("notice").textContent = `The page cannot be shown: ${error.message}`;
});
