// The examples of several runs: searched, narrowed to flips, sorted by any column; texts are only ever text.
"use strict";
(() => {
  const PAGE_ROWS = 50;
  const byId = (id) => document.getElementById(id);
  const known = (value) => value !== null && value !== undefined;
  const natural = new Intl.Collator("en", { numeric: true });
  const number = new Intl.NumberFormat("en", { maximumFractionDigits: 3 });
  let runs = [];
  let examples = [];
  let state = { q: "", show: "all", sort: "id", page: 1 };

  function el(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (known(value)) made.setAttribute(key, value);
    made.append(...children.flat().filter(known));
    return made;
  }

  function scoreCell(example, at) {
    const score = example.scores[at];
    if (!known(score)) return el("span", { class: "sign unscored", title: "not scored" }, "·");
    const mark = score >= 1 ? "right" : score <= 0 ? "wrong" : "part";
    const answer = known(example.answers[at]) ? el("bdi", { class: "clip" }, example.answers[at]) : null;
    return [el("span", { class: `sign ${mark}` }, number.format(score)), answer];
  }

  function columns() {
    return [
      { key: "id", title: "Example", by: (each) => each.id, kind: "problem", cell: (each) => [el("bdi", { class: "excerpt" }, each.prompt || ""), el("bdi", { class: "id code" }, each.id)] },
      { key: "subject", title: "Category", by: (each) => each.subject, kind: "subject", cell: (each) => el("bdi", {}, each.subject || ""), hidden: !examples.some((each) => known(each.subject)) },
      { key: "target", title: "Target", by: (each) => each.target || null, kind: "target", cell: (each) => el("bdi", { class: "clip" }, each.target || "") },
      ...runs.map((run, at) => ({ key: `run${at}`, title: run, by: (each) => each.scores[at], kind: "mark", cell: (each) => scoreCell(each, at) })),
    ].filter((column) => !column.hidden);
  }

  function sorted(chosen, all) {
    const sign = state.sort.startsWith("-") ? -1 : 1;
    const { by } = all.find((column) => column.key === state.sort.replace(/^-/, "")) || all[0];
    const compare = (a, b) => (typeof a === "string" ? natural.compare(a, b) : a - b);
    return chosen.sort((a, b) => {
      const [x, y] = [by(a), by(b)];
      const order = known(x) && known(y) ? sign * compare(x, y) : known(y) - known(x); // unknown ones stay last
      return order || natural.compare(a.id, b.id);
    });
  }

  function heading(column) {
    const isNow = column.key === state.sort.replace(/^-/, "");
    const now = isNow ? (state.sort.startsWith("-") ? "descending" : "ascending") : null;
    const arrow = now ? (now === "descending" ? "↓" : "↑") : "";
    const button = el("button", { type: "button", class: "sorter" }, el("bdi", {}, column.title), el("span", { class: "arrow", "aria-hidden": "true" }, arrow));
    button.addEventListener("click", () => change({ sort: now === "ascending" ? `-${column.key}` : column.key }));
    return el("th", { scope: "col", "data-key": column.key, "aria-sort": now, class: column.kind }, button);
  }

  function draw() {
    const words = state.q.trim().toLowerCase();
    const has = (each) => [each.id, each.prompt, each.target, ...each.answers].some((text) => known(text) && text.toLowerCase().includes(words));
    const all = columns();
    const chosen = sorted(examples.filter((each) => (state.show === "all" || each.flips) && (!words || has(each))), all);
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE_ROWS));
    state.page = Math.min(Math.max(1, state.page), pages);
    const from = (state.page - 1) * PAGE_ROWS;
    const visible = chosen.slice(from, from + PAGE_ROWS);
    const table = byId("table");
    table.tHead.replaceChildren(el("tr", {}, all.map(heading)));
    const cells = (each) => all.map((column) => el("td", { class: column.kind, "data-label": column.title }, column.cell(each)));
    table.tBodies[0].replaceChildren(...visible.map((each) => el("tr", { class: "example" }, cells(each))));
    byId("count").textContent = chosen.length ? `${number.format(from + 1)}–${number.format(from + visible.length)} of ${number.format(chosen.length)} examples` : "No example matches.";
    byId("page").textContent = `Page ${state.page} of ${pages}`;
    byId("previous").disabled = state.page <= 1;
    byId("next").disabled = state.page >= pages;
    document.querySelector(".pager").hidden = pages < 2;
  }

  function change(what) {
    state = { ...state, page: 1, ...what };
    draw();
  }

  addEventListener("DOMContentLoaded", () => {
    ({ runs, examples } = JSON.parse(byId("data").textContent));
    byId("q").addEventListener("input", (event) => change({ q: event.target.value }));
    byId("show").addEventListener("change", (event) => change({ show: event.target.value }));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("previous").addEventListener("click", () => change({ page: state.page - 1 }));
    byId("next").addEventListener("click", () => change({ page: state.page + 1 }));
    draw();
  });
})();
