"use strict";
// Fills the list of predictions from the page's data. Texts of the run are only ever set as text.
(() => {
  const PAGE = 24;
  const BENCHMARK = 0, ID = 1, PICTURE = 2, QUESTION = 3, REFERENCES = 4, MORE_REFERENCES = 5, SPLIT = 6, TYPE = 7;
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("data").textContent);
  const OUTCOMES = [
    ["", "all"], ["changed", "changed"], ["01", "wrong → right"], ["10", "right → wrong"], ["00", "both wrong"],
    ["11", "both right"], ["?1", "tuned right"], ["?0", "tuned wrong"], ["near", data.near],
  ];
  const cards = at("cards"), more = at("more"), count = at("filter-count"), form = at("filters");
  let rows = [], found = [], shown = 0, searched = [];

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const right = (answer) => answer !== null && answer[1] >= 0.5;
  const near = (answer) => answer !== null && answer[3] === 1;
  const verdict = (answer) => (right(answer) ? "right" : "wrong");

  const outcome = (row) => {
    if (row.left && row.right) {
      const [before, after] = [verdict(row.left), verdict(row.right)];
      return before === after ? `both ${before}` : `${before} → ${after}`;
    }
    return row.left ? `${row.names[0]} only: ${verdict(row.left)}` : `${row.names[1]} only: ${verdict(row.right)}`;
  };

  const answerBox = (name, answer) => {
    const box = make("div", `answer ${answer ? verdict(answer) : ""}`);
    const head = make("p", "small quiet", `${name}: `);
    box.append(head);
    if (!answer) {
      head.append("not evaluated");
      return box;
    }
    head.append(make("strong", right(answer) ? "good" : "bad", near(answer) ? data.near : verdict(answer)));
    if (answer[1] !== 0 && answer[1] !== 1) head.append(` (score ${answer[1]})`);
    if (answer[2]) head.append(", cut at the token limit");
    const text = answer[0].trim() ? make("p", "", answer[0]) : make("p", "quiet", "(empty answer)");
    text.dir = "auto";
    box.append(text);
    return box;
  };

  const picture = (question) => {
    const box = make("div", "picture");
    const address = data.pictures[question[PICTURE]];
    if (address) {
      const image = make("img");
      image.decoding = "async";
      image.alt = `Picture to the question: ${question[QUESTION].slice(0, 200)}`;
      image.src = address;
      box.append(image);
    } else {
      box.append(make("span", "", data.unpictured[-1 - question[PICTURE]]));
    }
    return box;
  };

  const references = (question) => {
    const line = make("p", "reference small", "Expected: ");
    question[REFERENCES].forEach(([text, times], place) => {
      if (place) line.append(", ");
      line.append(make("bdi", "", text));
      if (times > 1) line.append(` (${times}×)`);
    });
    if (question[MORE_REFERENCES]) line.append(`, and ${question[MORE_REFERENCES]} more`);
    return line;
  };

  const card = (row) => {
    const question = row.question;
    const item = make("li", "card");
    const body = make("div", "body");
    const told = outcome(row);
    const tone = told === "wrong → right" ? "good" : told === "right → wrong" ? "bad" : "quiet";
    const text = make("p", "question", question[QUESTION]);
    text.dir = "auto";
    const answers = make("div", "answers");
    answers.append(answerBox(row.names[0], row.left), answerBox(row.names[1], row.right));
    const where = make("p", "small quiet");
    where.append(
      make("bdi", "", [question[BENCHMARK], question[SPLIT], question[TYPE]].filter(Boolean).join(" · ")),
      make("br"), make("bdi", "", question[ID]),
    );
    body.append(make("p", `outcome ${tone}`, told), text, answers, references(question), where);
    item.append(picture(question), body);
    return item;
  };

  const showMore = () => {
    const next = found.slice(shown, shown + PAGE);
    cards.append(...next.map(card));
    const first = cards.children[shown];
    shown += next.length;
    more.hidden = shown >= found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
    return first;
  };

  const value = (name) => at(`filter-${name}`).value;
  const fill = (name, options) => {
    const select = at(`filter-${name}`);
    const before = select.value;
    select.replaceChildren(...options.map(([key, label]) => {
      const option = make("option", "", label);
      option.value = key;
      return option;
    }));
    if (options.some(([key]) => key === before)) select.value = before;
  };
  const choices = (place) => [["", "all"], ...[...new Set(rows.map((row) => row.question[place]))]
    .filter(Boolean).sort().map((name) => [name, name])];

  // The rows of the chosen run; beside its tuned answers stand those of its base, or of another run.
  const load = () => {
    const run = data.runs[Number(value("run"))];
    const other = value("beside") === "base" ? null : data.runs[Number(value("beside"))];
    const names = other ? [other.name, run.name] : ["base", "tuned"];
    const others = new Map(other ? other.rows.map((row) => [row[0], row[2]]) : []);
    rows = run.rows
      .filter((row) => !other || others.has(row[0]))
      .map((row) => ({ question: data.questions[row[0]], left: other ? others.get(row[0]) : row[1], right: row[2], names }));
    searched = [];
    fill("benchmark", choices(BENCHMARK));
    fill("type", choices(TYPE));
  };

  const haystack = (place) => {
    if (searched[place] === undefined) {
      const { question, left, right: after } = rows[place];
      searched[place] = [question[QUESTION], question[ID], ...question[REFERENCES].map((one) => one[0]),
        left ? left[0] : "", after ? after[0] : ""].join("\n").toLowerCase();
    }
    return searched[place];
  };

  const fits = (row, wanted) => {
    if (!wanted) return true;
    const [before, after] = [right(row.left), right(row.right)];
    if (wanted === "near") return near(row.left) || near(row.right);
    if (wanted === "changed") return row.left !== null && row.right !== null && before !== after;
    if (wanted[0] !== "?" && (row.left === null || before !== (wanted[0] === "1"))) return false;
    return row.right !== null && after === (wanted[1] === "1");
  };

  const filter = () => {
    const words = value("text").toLowerCase().split(/\s+/).filter(Boolean);
    const [benchmark, type, wanted] = [value("benchmark"), value("type"), value("outcome")];
    found = rows.filter((row, place) =>
      (!benchmark || row.question[BENCHMARK] === benchmark) && (!type || row.question[TYPE] === type)
      && fits(row, wanted) && words.every((word) => haystack(place).includes(word)));
    cards.replaceChildren();
    shown = 0;
    showMore();
    count.textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} questions`;
    keep();
  };

  // A page that is served loads itself anew while a run goes on: the filters survive that.
  const FILTERS = ["text", "run", "beside", "benchmark", "outcome", "type"];
  const keep = () => {
    try {
      sessionStorage.setItem("vlm-sft-filters", JSON.stringify(FILTERS.map(value)));
    } catch { /* a page of a file may have no storage */ }
  };
  const restore = (names) => {
    try {
      const kept = JSON.parse(sessionStorage.getItem("vlm-sft-filters")) || [];
      FILTERS.forEach((name, place) => {
        const field = at(`filter-${name}`);
        const known = name === "text" || [...field.options].some((option) => option.value === kept[place]);
        if (names.includes(name) && kept[place] !== undefined && known) field.value = kept[place];
      });
    } catch { /* as above */ }
  };

  const browse = () => {
    fill("run", data.runs.map((run, place) => [String(place), run.name]));
    fill("beside", [["base", "its base model"], ...data.runs.map((run, place) => [String(place), run.name])]);
    fill("outcome", OUTCOMES);
    restore(["text", "run", "beside", "outcome"]);
    load();
    restore(["benchmark", "type"]);
    for (const name of ["run", "beside"]) at(`filter-${name}`).addEventListener("change", () => { load(); filter(); });
    for (const name of ["benchmark", "outcome", "type"]) at(`filter-${name}`).addEventListener("change", filter);
    let timer = 0;
    at("filter-text").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 120); });
    form.addEventListener("submit", (event) => { event.preventDefault(); filter(); });
    more.addEventListener("click", () => {
      const first = showMore();
      if (first) { first.tabIndex = -1; first.focus({ preventScroll: true }); }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
        event.preventDefault();
        at("filter-text").focus();
      }
    });
    form.hidden = false;
    filter();
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    const read = (row, column) => {
      const cell = row.cells[column];
      const text = cell ? cell.dataset.value ?? cell.textContent.trim() : "";
      const number = Number(text.replaceAll(",", ""));
      return text !== "" && Number.isFinite(number) ? number : text;
    };
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = make("button", "sort", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const sign = down ? -1 : 1;
        body.append(...[...body.rows].map((row) => [read(row, column), row]).sort(([a], [b]) => {
          if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
          return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
        }).map((pair) => pair[1]));
      });
    });
  };

  // Of many runs, the parts of one are put in place when it is opened.
  for (const run of document.querySelectorAll("details.run")) {
    run.addEventListener("toggle", () => run.querySelector(":scope > template")?.replaceWith(
      run.querySelector(":scope > template").content));
  }

  // A link to a run opens it.
  const open = () => {
    const target = at(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
  for (const one of document.querySelectorAll("time")) {
    const moment = new Date(one.dateTime);
    if (Number.isNaN(moment.getTime())) continue;
    one.title = one.textContent;
    one.textContent = moment.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  }
  document.querySelectorAll("table.sortable").forEach(sortable);
  if (cards && data.runs.some((run) => run.rows.length)) browse();
  open();
})();
