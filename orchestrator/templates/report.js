// The problems of a report: filter, sort, page and open them. Data reaches the page as text nodes only, never as markup.
"use strict";
(() => {
  const PAGE_ROWS = 50;
  const MARKS_MAX = 10; // more candidates than this are counted, not drawn one by one
  const LIT_MAX = 200; // matches lit up in one text
  const START = { q: "", show: "all", subject: "", sort: "problem", page: 1 };
  const SIGNS = { right: "✓", wrong: "✗", part: "≈", unscored: "–", read: "·" };
  const byId = (id) => document.getElementById(id);
  const known = (value) => value !== null && value !== undefined;
  const number = new Intl.NumberFormat("en");
  const natural = new Intl.Collator("en", { numeric: true });

  /** A new element; attributes that are null or false are left out, children are nodes or text. */
  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (known(value) && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(9).filter(known));
    return node;
  }

  // --- the data, with what is counted once ---

  let examples = [];
  let selectors = []; // majority and the re-rankers, as far as any example has them
  let skip = 0;
  let state = { ...START };
  let opened = new Set();
  let needle = null;
  let visible = [];

  const verdict = (candidate) =>
    !known(candidate.score) ? (known(candidate.nats) ? "read" : "unscored") : candidate.score >= 1 ? "right" : candidate.score > 0 ? "part" : "wrong";
  /** A text as it is searched: a cut one is [start, characters cut, end]. */
  const flat = (text) => (!known(text) ? "" : Array.isArray(text) ? `${text[0]} … ${text[2]}` : text);

  function count(example) {
    const marks = example.candidates.map(verdict);
    const scores = example.candidates.map((each) => each.score).filter(known);
    example.marks = marks;
    example.right = marks.filter((mark) => mark === "right").length;
    example.mean = scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
    const tokens = example.candidates.map((each) => each.tokens).filter(known);
    example.tokens = tokens.length ? tokens.reduce((sum, each) => sum + each, 0) : null;
    example.unscored = marks.includes("unscored");
    const kinds = new Set(marks.filter((mark) => mark !== "unscored"));
    example.state = kinds.size === 0 ? "unscored" : kinds.size === 1 && !kinds.has("part") ? [...kinds][0] : "mixed";
    example.tied = new Set(example.picks.filter((pick) => pick.tied).map((pick) => pick.by));
    example.picked = new Map(example.picks.map((pick) => [pick.by, marks[example.candidates.findIndex((each) => each.n === pick.n)]]));
  }

  /** How many characters all prompts begin with alike (fixed shots, an instruction): the list starts after them. */
  function sharedStart() {
    if (examples.length < 2) return 0;
    const starts = examples.map((each) => (Array.isArray(each.prompt) ? each.prompt[0] : each.prompt || ""));
    let length = starts[0].length;
    for (const start of starts) {
      let same = 0;
      while (same < length && start[same] === starts[0][same]) same += 1;
      length = same;
    }
    if (starts.some((start) => start.length === length)) return 0;
    const shared = starts[0].slice(0, length);
    return Math.max(shared.lastIndexOf(" "), shared.lastIndexOf("\n")) + 1;
  }

  function excerpt(example) {
    const prompt = example.prompt;
    if (!known(prompt)) return "(no prompt)";
    const text = Array.isArray(prompt) && skip >= prompt[0].length * 0.8 ? `… ${prompt[2]}` : flat(prompt).slice(skip);
    return text.slice(0, 240).trim() || "(empty prompt)";
  }

  function haystack(example) {
    const texts = [example.id, example.subject, example.prompt, example.target];
    for (const each of example.candidates) texts.push(each.text, each.answer, each.error);
    return texts.map(flat).join("\n");
  }

  // --- what to show, kept in the address ---

  function readAddress() {
    if (location.hash && !location.hash.includes("=")) return; // a link to a place on the page
    const given = new URLSearchParams(location.hash.slice(1));
    const text = (key) => given.get(key) ?? START[key];
    state = { q: text("q"), show: text("show"), subject: text("subject"), sort: text("sort"), page: START.page };
    state.page = Math.max(1, parseInt(given.get("page"), 10) || 1);
    if (!byId("filters").querySelector(`[name=show][value="${CSS.escape(state.show)}"]`)) state.show = START.show;
    if (!columns().some((column) => column.key === state.sort.replace(/^-/, ""))) state.sort = START.sort;
    opened = new Set(given.getAll("open"));
  }

  function writeAddress() {
    const given = new URLSearchParams();
    for (const key of Object.keys(START)) if (state[key] !== START[key]) given.set(key, state[key]);
    for (const id of [...opened].slice(-5)) given.append("open", id);
    try {
      history.replaceState(null, "", String(given) ? `#${given}` : location.pathname + location.search);
    } catch {
      // some browsers limit how often; the page works on without
    }
  }

  /** How a way of choosing is called: the only re-ranker there is needs no name. */
  const called = (name) =>
    name === "majority" ? "Majority" : selectors.filter((each) => each !== "majority").length > 1 ? name : "Re-ranker";

  /** The columns there are something for: key, heading, what to sort by, the cell. */
  function columns() {
    const some = (test) => examples.some(test);
    const all = [
      { key: "problem", title: "Problem", by: (each) => each.order, cell: problemCell, kind: "problem" },
      { key: "subject", title: "Subject", by: (each) => each.subject, cell: (each) => el("bdi", {}, lit(each.subject)), shown: some((each) => known(each.subject)) },
      { key: "right", title: "Right", by: (each) => each.mean, cell: rightCell },
    ];
    for (const name of selectors) {
      const title = called(name);
      const order = { right: 2, part: 1, wrong: 0 };
      all.push({ key: `by:${name}`, title, by: (each) => order[each.picked.get(name)], cell: (each) => (each.tied.has(name) ? "tie" : signOf(each.picked.get(name))), kind: "mark" });
    }
    all.push(
      { key: "target", title: "Target", by: (each) => flat(each.target) || null, cell: (each) => el("bdi", { class: "clip" }, lit(flat(each.target).slice(0, 80))), kind: "target" },
      { key: "tokens", title: "Tokens", by: (each) => each.tokens, cell: (each) => (known(each.tokens) ? number.format(each.tokens) : "–"), kind: "number", shown: some((each) => known(each.tokens)) },
    );
    return all.filter((column) => column.shown !== false);
  }

  function compare(a, b) {
    if (!known(a) || !known(b)) return known(b) - known(a);
    return typeof a === "string" ? natural.compare(a, b) : a - b;
  }

  function sorted(chosen) {
    const sign = state.sort.startsWith("-") ? -1 : 1;
    const { by } = columns().find((column) => column.key === state.sort.replace(/^-/, ""));
    return chosen.sort((a, b) => {
      const [x, y] = [by(a), by(b)];
      return (known(x) && known(y) ? sign : 1) * compare(x, y) || a.order - b.order; // unknown ones stay last
    });
  }

  const isShown = (example, show) =>
    show === "all" || (show === "unscored" ? example.unscored : example.state === show);

  // --- drawing ---

  function signOf(mark) {
    if (!mark) return el("span", { class: "sign unscored", title: "none" }, "·", el("span", { class: "hidden" }, "none"));
    const word = { unscored: "not scored", part: "partly right" }[mark] || mark;
    return el("span", { class: `sign ${mark}`, title: word }, el("span", { "aria-hidden": "true" }, SIGNS[mark]), el("span", { class: "hidden" }, word));
  }

  /** Text with the searched words lit. */
  function lit(text) {
    if (!known(text)) return [];
    if (!needle) return [text];
    const parts = [];
    let end = 0;
    for (const match of text.matchAll(needle)) {
      if (parts.length > 2 * LIT_MAX) break;
      parts.push(text.slice(end, match.index), el("mark", {}, match[0]));
      end = match.index + match[0].length;
    }
    return [...parts, text.slice(end)];
  }

  /** A text in full, with a visible mark where it was cut. */
  function prose(text, name) {
    const parts = Array.isArray(text)
      ? [lit(text[0]), el("span", { class: "cut" }, `${number.format(text[1])} characters cut; all of it is in rows.jsonl`), lit(text[2])]
      : lit(text);
    return el("div", { class: "prose", dir: "auto", tabindex: "0", role: "group", "aria-label": name }, parts);
  }

  function problemCell(example) {
    const open = opened.has(example.id);
    return [
      el("button", { type: "button", class: "toggle", "aria-expanded": String(open) }, el("bdi", { class: "excerpt" }, lit(excerpt(example)))),
      el("bdi", { class: "id code" }, lit(example.id)),
    ];
  }

  function rightCell(example) {
    const { marks } = example;
    const total = marks.length;
    const share = el("span", { class: "share" }, `${number.format(example.right)}/${number.format(total)}`);
    if (total > MARKS_MAX || total < 2) return total < 2 ? marks.map(signOf) : share;
    return [el("span", { class: "marks", "aria-hidden": "true" }, marks.map((mark) => el("span", { class: `sign ${mark}` }, SIGNS[mark]))), share];
  }

  function row(example, shownColumns) {
    const cells = shownColumns.map((column) =>
      el("td", { class: column.kind || column.key.replace(/\W.*/, ""), "data-label": column.title }, column.cell(example)),
    );
    const line = el("tr", { class: "example", "data-state": example.state }, cells);
    const button = line.querySelector(".toggle");
    let detail = null;
    const show = (open) => {
      button.setAttribute("aria-expanded", String(open));
      line.classList.toggle("open", open);
      if (open && !detail) line.after((detail = el("tr", { class: "detail" }, el("td", { colspan: cells.length }, detailOf(example)))));
      if (detail) detail.hidden = !open;
    };
    line.addEventListener("click", (event) => {
      if (!event.target.closest("button") && String(getSelection())) return; // the reader is marking text
      const open = !opened.has(example.id);
      if (open) opened.add(example.id);
      else opened.delete(example.id);
      show(open);
      writeAddress();
    });
    return { line, show };
  }

  function detailOf(example) {
    const target = known(example.target) ? el("div", { class: "target" }, el("h4", {}, "Target"), prose(example.target, "Target")) : null;
    const errors = example.picks.filter((pick) => known(pick.error)).map((pick) => el("div", { class: "error" }, `${called(pick.by)} failed: `, flat(pick.error)));
    return el(
      "div",
      { class: "inside" },
      el("div", { class: "asked" }, el("div", {}, el("h4", {}, "Problem"), prose(known(example.prompt) ? example.prompt : "(no prompt)", "Problem")), target),
      errors,
      el("div", { class: "candidates" }, example.candidates.map((each, at) => candidateCard(example, each, at))),
    );
  }

  function candidateCard(example, candidate, at) {
    const mark = example.marks[at];
    const partly = mark === "part" ? ` ${number.format(candidate.score)}` : "";
    const word = { right: "right", wrong: "wrong", part: "partly right", unscored: "not scored", read: "read" }[mark];
    const tags = [el("span", { class: `tag ${mark}` }, `${SIGNS[mark]} ${word}${partly}`)];
    for (const pick of example.picks) {
      const score = pick.scores ? pick.scores[candidate.n] : null;
      const name = { Majority: "majority vote", "Re-ranker": "re-ranker" }[called(pick.by)] || pick.by;
      const said = known(score) ? ` ${number.format(score)}` : "";
      if (pick.n === candidate.n) tags.push(el("span", { class: "tag chosen" }, "chosen by ", el("bdi", {}, name), said));
      else if (said) tags.push(el("span", { class: "tag" }, el("bdi", {}, name), said));
    }
    if (candidate.end === "length") tags.push(el("span", { class: "tag warn" }, "cut at the token limit"));
    const facts = [];
    if (known(candidate.tokens)) facts.push(`${number.format(candidate.tokens)} tokens`);
    if (known(candidate.end) && candidate.end !== "length") facts.push(`ended by ${flat(candidate.end)}`);
    const answer = known(candidate.answer) ? el("bdi", { class: "answer" }, lit(flat(candidate.answer))) : el("span", { class: "none" }, "none found");
    return el(
      "article",
      { class: `candidate ${mark}` },
      el("header", {}, el("h4", {}, `Answer ${at + 1}`), tags),
      known(candidate.answer) || !(known(candidate.error) || known(candidate.nats)) ? el("p", { class: "found" }, el("span", { class: "key" }, "Extracted"), answer) : null,
      rulesOf(candidate),
      known(candidate.error) ? el("div", { class: "error" }, lit(flat(candidate.error))) : null,
      known(candidate.text) ? prose(candidate.text, `Completion ${at + 1}`) : null,
      candidate.logliks ? el("ol", { class: "logliks", start: "0", "aria-label": "Log-likelihood of each choice" }, candidate.logliks.map((each, place) => el("li", {}, known(each) ? each.toFixed(3) : "–", candidate.choices && known(candidate.choices[place]) ? [" ", el("bdi", {}, flat(candidate.choices[place]))] : null))) : null,
      known(candidate.nats) ? el("p", { class: "found" }, el("span", { class: "key" }, "Perplexity by token"), el("bdi", { class: "answer" }, number.format(Math.exp(candidate.nats)))) : null,
      facts.length ? el("footer", {}, facts.join(" · ")) : null,
    );
  }

  function rulesOf(candidate) {
    if (!candidate.rules) return null;
    const rule = ([name, answer, score]) =>
      el("li", {}, signOf(verdict({ score })), " ", el("bdi", { class: "key" }, name), " ", known(answer) ? el("bdi", {}, flat(answer)) : "none found");
    return el("ul", { class: "rules", "aria-label": "By rule" }, candidate.rules.map(rule));
  }

  function heading(column) {
    const key = state.sort.replace(/^-/, "");
    const down = state.sort.startsWith("-");
    const now = column.key === key ? (down ? "descending" : "ascending") : null;
    const button = el("button", { type: "button", class: "sorter" }, el("bdi", {}, column.title), el("span", { class: "arrow", "aria-hidden": "true" }, now ? (down ? "↓" : "↑") : ""));
    button.addEventListener("click", () => {
      change({ sort: now === "ascending" ? `-${column.key}` : column.key });
      [...byId("table").tHead.querySelectorAll("th")].find((each) => each.dataset.key === column.key).querySelector("button").focus();
    });
    return el("th", { scope: "col", class: column.kind || null, "data-key": column.key, "aria-sort": now }, button);
  }

  const allOpen = () => visible.length > 0 && visible.every((each) => opened.has(each.id));

  function draw() {
    const words = state.q.trim().replace(/[\^$\\.*+?()[\]{}|/]/g, "\\$&");
    needle = words ? new RegExp(words, "giu") : null;
    const finder = words ? new RegExp(words, "iu") : null;
    const inScope = examples.filter(
      (each) => (!state.subject || each.subject === state.subject) && (!finder || finder.test((each.hay ??= haystack(each)))),
    );
    const chosen = sorted(inScope.filter((each) => isShown(each, state.show)));
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE_ROWS));
    state.page = Math.min(state.page, pages);
    const from = (state.page - 1) * PAGE_ROWS;
    visible = chosen.slice(from, from + PAGE_ROWS);
    const shownColumns = columns();
    const table = byId("table");
    table.tHead.replaceChildren(el("tr", {}, shownColumns.map(heading)));
    const rows = visible.map((each) => row(each, shownColumns));
    table.tBodies[0].replaceChildren(...rows.map((each) => each.line));
    rows.forEach((each, at) => opened.has(visible[at].id) && each.show(true));
    for (const slot of document.querySelectorAll("[data-count]")) {
      slot.textContent = number.format(inScope.filter((each) => isShown(each, slot.dataset.count)).length);
    }
    table.hidden = !chosen.length;
    byId("count").textContent = chosen.length
      ? `${number.format(from + 1)}–${number.format(from + visible.length)} of ${number.format(chosen.length)} problems`
      : "No problem matches.";
    byId("page").textContent = `Page ${state.page} of ${pages}`;
    byId("previous").disabled = state.page <= 1;
    byId("next").disabled = state.page >= pages;
    document.querySelector(".pager").hidden = pages < 2;
    byId("open-all").textContent = allOpen() ? "Close all" : "Open all";
    showFilters(shownColumns);
  }

  function showFilters(shownColumns) {
    if (byId("q").value !== state.q) byId("q").value = state.q;
    for (const radio of byId("filters").elements.show) radio.checked = radio.value === state.show;
    byId("subject").value = state.subject;
    const orders = shownColumns.flatMap((column) => [[column.key, `${column.title} ↑`], [`-${column.key}`, `${column.title} ↓`]]);
    byId("sort").replaceChildren(...orders.map(([value, title]) => el("option", { value }, title)));
    byId("sort").value = state.sort;
    byId("clear").hidden = state.q === START.q && state.show === START.show && state.subject === START.subject;
  }

  function change(what) {
    state = { ...state, page: 1, ...what };
    draw();
    writeAddress();
  }

  function turn(by) {
    change({ page: state.page + by });
    byId("problems").scrollIntoView();
  }

  // --- hands ---

  function listen() {
    let waiting = 0;
    byId("q").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => change({ q: event.target.value }), 120);
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const radio of byId("filters").elements.show) radio.addEventListener("change", () => change({ show: radio.value }));
    byId("subject").addEventListener("change", (event) => change({ subject: event.target.value }));
    byId("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
    byId("clear").addEventListener("click", () => {
      change({ q: START.q, show: START.show, subject: START.subject });
      byId("q").focus();
    });
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("open-all").addEventListener("click", () => {
      opened = new Set(allOpen() ? [] : visible.map((each) => each.id));
      draw();
      writeAddress();
    });
    addEventListener("hashchange", () => {
      readAddress();
      draw();
    });
    addEventListener("keydown", keys);
  }

  /** `/` searches; up and down walk from problem to problem. */
  function keys(event) {
    const typing = event.target.closest && event.target.closest("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      byId("q").focus();
    }
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.classList.contains("toggle")) {
      const all = [...document.querySelectorAll(".toggle")];
      const next = all[all.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
      if (next) {
        event.preventDefault();
        next.focus();
      }
    }
  }

  addEventListener("DOMContentLoaded", () => {
    ({ examples } = JSON.parse(byId("data").textContent));
    examples.sort((a, b) => natural.compare(a.id, b.id));
    examples.forEach((example, order) => Object.assign(example, { order }));
    examples.forEach(count);
    skip = sharedStart();
    selectors = [...new Set(examples.flatMap((each) => each.picks.map((pick) => pick.by)))];
    selectors.sort((a, b) => (b === "majority") - (a === "majority"));
    const subjects = [...new Set(examples.map((each) => each.subject).filter(known))].sort(natural.compare);
    byId("subject").append(el("option", { value: "" }, "All subjects"), ...subjects.map((value) => el("option", { value }, value)));
    byId("subject-choice").hidden = subjects.length < 2;
    byId("browser").hidden = false;
    readAddress();
    draw();
    listen();
  });
})();
