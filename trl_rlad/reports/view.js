"use strict";
// Draws the rollouts of a page from its data. Whatever comes from a run is set as text, never as HTML.
(() => {
  const facts = document.getElementById("facts");
  const holder = document.getElementById("data");
  const data = holder ? JSON.parse(holder.textContent) : {groups: [], texts: [], steps: []};
  const BIG = data.steps[2]; // nats from which a disagreement is large
  const FOLD = 120, HEAD = 40, TAIL = 20; // tokens without colour: from how many they are folded, and what is left
  const CHUNK = 1000; // tokens that are drawn at once
  const CLIPPED = ["", "teacher", "policy"];

  function make(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== ""));
    return element;
  }
  const bytes = (text) => (Uint8Array.fromBase64 || ((x) => Uint8Array.from(atob(x), (c) => c.charCodeAt(0))))(text);
  const decode = (text, Kind) => new Kind(bytes(text).buffer);
  const count = (n) => n.toLocaleString("en");
  const percent = (logp) => {
    const share = 100 * Math.exp(logp / data.grid);
    return share >= 0.1 ? `${share.toFixed(share < 99.95 ? 1 : 0)}%` : share >= 1e-7 ? `${share.toPrecision(1)}%` : "0%";
  };
  const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
  const visible = (text) => text.trim() || JSON.stringify(text);

  // ---- what is drawn when it comes into sight
  const waiting = new WeakMap();
  const sight = new IntersectionObserver((entries) => {
    for (const {isIntersecting, target} of entries) if (isIntersecting) drawNow(target);
  }, {rootMargin: "1000px"});
  function drawLater(element, height, draw) {
    element.style.minHeight = `${height}px`;
    waiting.set(element, draw);
    sight.observe(element);
  }
  function drawNow(element) {
    const draw = waiting.get(element);
    if (!draw) return;
    waiting.delete(element);
    sight.unobserve(element);
    draw();
    element.style.minHeight = "";
  }

  // ---- a completion
  const rows = []; // in the order of the page
  class Row {
    constructor(group, facts) {
      Object.assign(this, {group, facts, length: facts.length});
      rows.push(this);
    }
    open() {
      if (this.tokens) return this;
      this.tokens = decode(this.facts.tokens, this.facts.wide ? Uint32Array : Uint16Array);
      this.student = decode(this.facts.student, Int16Array);
      this.scored = decode(this.facts.scored, Int16Array);
      this.clipped = this.facts.clipped && decode(this.facts.clipped, Uint8Array);
      this.named = this.facts.named || {};
      return this;
    }
    text(i) { return data.texts[this.tokens[i]]; }
    size(first, end) { // of tokens, in characters
      let size = 0;
      for (let i = first; i < end; i++) size += this.text(i).length;
      return size;
    }
    gap(i) { return this.scored[i] === data.unscored ? null : (this.student[i] - this.scored[i]) / data.grid; }
    get all() { this.open(); return this.cached ??= Array.from(this.tokens, (id) => data.texts[id]).join(""); }
    get large() {
      this.open();
      return this.cachedLarge ??= [...this.tokens.keys()].filter((i) => Math.abs(this.gap(i)) > BIG);
    }
    look(i) {
      const gap = this.gap(i), size = Math.abs(gap), clipped = this.clipped ? this.clipped[i] : 0;
      let depth = 0;
      while (size > data.steps[depth]) depth++;
      const look = gap === null ? "mute" : depth ? (gap > 0 ? "s" : "t") + (depth - 1) : "";
      return clipped ? `${look} ${CLIPPED[clipped]}` : look;
    }
    say(i) {
      const named = this.named[i] || [], parts = [];
      for (let k = 0; k < named.length; k += 2) parts.push(`${visible(data.texts[named[k]])} ${named[k + 1]}%`);
      return parts;
    }
    describe(i) {
      const gap = this.gap(i), lines = [`${visible(this.text(i))}   student ${percent(this.student[i])}`];
      if (gap === null) lines[0] += ", not read by the teacher";
      else lines[0] += `, teacher ${percent(this.scored[i])} (log ratio ${signed(gap)})`;
      const say = this.say(i);
      if (say.length) lines.push(`teacher would say: ${say.join(", ")}`);
      if (this.clipped && this.clipped[i]) lines.push(`clipped by the ${CLIPPED[this.clipped[i]]}`);
      return lines.join("\n");
    }
    // Runs of tokens: [first, end, classes, whether folded]. Each token with a colour is one of its own.
    runs() {
      const runs = [];
      for (let i = 0; i < this.tokens.length;) {
        const look = this.look(i), first = i++;
        if (look === "" || look === "mute") while (i < this.tokens.length && this.look(i) === look) i++;
        if (i - first > FOLD) runs.push([first, first + HEAD, look], [first + HEAD, i - TAIL, look, true], [i - TAIL, i, look]);
        else runs.push([first, i, look]);
      }
      return runs;
    }
    draw() {
      this.open();
      this.strip();
      let chunk = [], size = 0;
      const finish = () => {
        if (!chunk.length) return;
        const element = make("div", {class: "tokens"}), mine = chunk, [first] = chunk[0], [, end] = chunk.at(-1);
        this.chunks.push({element, first, end});
        this.body.append(element);
        drawLater(element, 24 * Math.ceil((size * 5 * 8) / (this.body.clientWidth || 600)), () => {
          for (const run of mine) element.append(this.drawRun(...run));
        });
        chunk = [];
        size = 0;
      };
      this.chunks = [];
      for (const run of this.runs()) {
        chunk.push(run);
        size += run[3] ? 5 : run[1] - run[0];
        const ends = this.text(run[1] - 1).includes("\n"); // no line is broken but a very long one
        if (size > 2 * CHUNK || (size > CHUNK && ends)) finish();
      }
      finish();
    }
    drawRun(first, end, look, isFolded) {
      if (isFolded) {
        const button = make("button", {type: "button", class: "fold", "data-first": first, "data-end": end},
          `… ${count(end - first)} tokens without colour …`);
        button.unfold = () => button.replaceWith(this.drawRun(first, end, look));
        button.addEventListener("click", button.unfold);
        return button;
      }
      let text = "";
      for (let i = first; i < end; i++) text += this.text(i);
      const isToken = look !== "" && look !== "mute";
      const span = make("span", {"data-first": first, "data-end": end, class: look, tabindex: -1},
        isToken && text.trim() === "" ? text.replaceAll("\n", "⏎\n") : text);
      span.row = this;
      const say = isToken && Math.abs(this.gap(first)) > BIG ? this.say(first) : [];
      if (!say.length || !(this.gap(first) > 0)) return span;
      const both = document.createDocumentFragment();
      both.append(span, make("span", {class: "say"}, say[0]));
      return both;
    }
    strip() {
      const canvas = this.canvas, width = (canvas.width = 300), height = (canvas.height = 16), n = this.tokens.length;
      const context = canvas.getContext("2d");
      this.bins = Array.from({length: Math.min(width, n)}, () => [0, 0]);
      for (let i = 0; i < n; i++) {
        const bin = this.bins[Math.floor((i * this.bins.length) / n)], gap = this.gap(i);
        if (Math.abs(gap) > Math.abs(bin[1]) || !bin[1]) [bin[0], bin[1]] = [i, gap || 0];
      }
      this.bins.forEach(([, gap], k) => {
        const strength = Math.min(1, Math.abs(gap) / data.steps.at(-1)), tall = Math.max(1, strength * height);
        context.fillStyle = `rgb(${gap > 0 ? "233 113 23" : "52 120 235"} / ${Math.abs(gap) > data.steps[0] ? 1 : 0.15})`;
        context.fillRect((k * width) / this.bins.length, height - tall, Math.ceil(width / this.bins.length), tall);
      });
    }
    element() {
      const {reward, advantage, times, mean, solved, teacher} = this.facts;
      const side = advantage > 0 ? "up" : advantage < 0 ? "down" : "";
      const lines = [
        make("b", {class: solved ? "up" : solved === false ? "down" : ""}, reward === null ? "not judged" : `reward ${+reward.toPrecision(4)}`),
        make("span", {class: side}, `advantage ${signed(advantage)}`),
        make("span", {}, mean === null ? "not read by the teacher" : `student − teacher ${signed(mean)} nats`),
        make("span", {}, `${count(this.length)} tokens`),
      ];
      if (times > 1) lines.push(make("span", {}, `${times} times the same`));
      if (teacher) lines.push(make("span", {}, `teacher ${teacher}`));
      this.canvas = make("canvas", {role: "img", title: "where student and teacher disagree: click to go there",
        "aria-label": "where student and teacher disagree, from the first token to the last"});
      this.canvas.addEventListener("click", (event) => {
        const k = Math.floor((event.offsetX / this.canvas.clientWidth) * this.bins.length);
        const near = this.bins.slice(Math.max(0, k - 3), k + 4).sort((x, y) => Math.abs(y[1]) - Math.abs(x[1]));
        if (near.length) go(this, near[0][0]);
      });
      this.body = make("div", {class: "body"});
      this.root = make("div", {class: "row"}, make("div", {class: "label"}, ...lines, this.canvas), this.body);
      drawLater(this.body, Math.min(12000, 24 + this.length * 1.2), () => this.draw());
      return this.root;
    }
    // The element that shows a token
    find(i) {
      drawNow(this.body);
      drawNow(this.chunks.find(({first, end}) => first <= i && i < end).element);
      const inside = () => [...this.body.querySelectorAll("[data-first]")].find(
        ({dataset}) => +dataset.first <= i && i < +dataset.end);
      if (inside().unfold) inside().unfold();
      return inside();
    }
  }

  // ---- groups
  const place = document.getElementById("groups");
  const groups = data.groups.map((group, number) => {
    const solved = group.rewards.filter((x) => x !== null);
    const title = [group.run, group.split === "eval" ? `evaluation at step ${group.step}` : `step ${group.step}`,
      `group ${group.group}`, group.kind, `teacher's part ${group.part.toFixed(2)}`].filter(Boolean).join(" · ");
    const rewards = solved.length ? `rewards ${group.rewards.map((x) => (x === null ? "?" : +x.toPrecision(3))).join(", ")}` : "";
    const root = make("details", {}, make("summary", {}, title, make("small", {class: "rewards"}, rewards),
      make("small", {class: "start"}, group.prompt.trim().slice(0, 160))));
    const self = {...group, root, rows: group.rows.map((facts) => new Row(number, facts)), open() {
      if (root.children.length > 1) return;
      root.append(make("div", {class: "prompt", tabindex: 0}, group.prompt), ...self.rows.map((row) => row.element()));
      filter(self);
    }};
    root.addEventListener("toggle", () => root.open && self.open());
    place.append(root);
    return self;
  });
  const openGroup = (row) => { const group = groups[row.group]; group.root.open = true; group.open(); };

  // ---- filters and search
  const form = document.getElementById("filters"), wanted = {};
  function choice(name, label, values, words) {
    const distinct = [...new Set(values)];
    if (distinct.length < 2) return;
    const select = make("select", {name}, make("option", {value: ""}, "all"),
      ...distinct.map((value) => make("option", {value}, (words && words[value]) || String(value))));
    form.append(make("label", {}, label, select));
    wanted[name] = select;
  }
  function filter(group) {
    const of = (name) => (wanted[name] ? wanted[name].value : "");
    const fits = (name, value) => of(name) === "" || of(name) === String(value);
    const text = search.value.toLowerCase();
    group.fits = ["run", "step", "split", "kind"].every((name) => fits(name, group[name]));
    for (const row of group.rows) {
      row.fits = group.fits && fits("outcome", row.facts.solved) && fits("teacher", row.facts.teacher);
      if (row.root) row.root.hidden = !row.fits;
    }
    group.fits &&= group.rows.some((row) => row.fits);
    if (group.fits && text) {
      group.fits = group.prompt.toLowerCase().includes(text) || group.rows.some((row) => row.fits && row.all.toLowerCase().includes(text));
    }
    group.root.hidden = !group.fits;
  }
  const search = make("input", {type: "search", name: "search", placeholder: "text of a prompt or completion"});
  const said = make("output");
  let at = null; // row and token where the reader is
  let found = -1; // where in the row's text the last hit begins
  if (form) {
    choice("run", "run ", groups.map((group) => group.run));
    choice("split", "rollouts of ", groups.map((group) => group.split), {train: "training", eval: "evaluation"});
    choice("step", "step ", groups.map((group) => group.step).sort((a, b) => a - b));
    choice("kind", "kept as ", groups.map((group) => group.kind));
    choice("outcome", "completions ", rows.map((row) => row.facts.solved), {true: "solved", false: "failed", null: "not judged"});
    choice("teacher", "teacher ", rows.map((row) => row.facts.teacher));
    const next = make("button", {type: "button"}, "next");
    form.append(make("label", {}, "search ", search), next, said);
    form.addEventListener("submit", (event) => { event.preventDefault(); nextHit(); });
    next.addEventListener("click", nextHit);
    form.addEventListener("input", () => {
      at = null;
      found = -1;
      said.textContent = `${count(refresh())} of ${count(groups.length)} groups`;
    });
    refresh();
  }
  // Shows what fits, the first groups of it unfolded, and returns their number
  function refresh() {
    groups.forEach(filter);
    const shown = groups.filter((group) => group.fits);
    shown.slice(0, 3).forEach((group) => { group.root.open = true; group.open(); });
    return shown.length;
  }
  function nextHit() {
    const text = search.value.toLowerCase();
    if (!text) return;
    const shown = rows.filter((row) => row.fits && groups[row.group].fits);
    const start = at ? shown.indexOf(at.row) : 0;
    for (let k = 0; k <= shown.length; k++) {
      const row = shown[(start + k) % shown.length];
      const hit = row ? row.all.toLowerCase().indexOf(text, k === 0 && at ? found + 1 : 0) : -1;
      if (hit < 0) continue;
      let i = 0, length = 0;
      while (length + row.text(i).length <= hit) length += row.text(i++).length;
      found = hit;
      go(row, i, false);
      mark(row, hit, hit + text.length);
      return;
    }
    said.textContent = "found in no completion";
  }
  // Characters of a span's text
  function part(span, first, end) {
    const range = document.createRange(), node = span.firstChild || span, length = node.textContent.length;
    range.setStart(node, Math.min(length, first));
    range.setEnd(node, Math.min(length, end));
    return range;
  }
  function mark(row, first, end) {
    if (!globalThis.Highlight) return;
    // The token's place in the text of its span is that of the hit, less what comes before the span
    const span = row.find(at.i), before = row.size(0, +span.dataset.first);
    CSS.highlights.set("found", new Highlight(part(span, first - before, end - before)));
  }

  // ---- where the reader is
  function show(span, i) {
    facts.textContent = span.row ? span.row.describe(i) : span.textContent;
    facts.hidden = false;
    const own = facts.getBoundingClientRect(), start = span.row && span.row.size(+span.dataset.first, i);
    // Of a token on two lines, the larger part: the other may be its blank
    const boxes = [...(span.row ? part(span, start, start + span.row.size(i, i + 1)) : span).getClientRects()];
    const box = boxes.sort((a, b) => b.width - a.width)[0] || span.getBoundingClientRect();
    const below = box.bottom + 6 + own.height < innerHeight;
    facts.style.left = `${Math.max(4, Math.min(box.left, innerWidth - own.width - 12))}px`;
    facts.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - own.height - 6)}px`;
  }
  function go(row, i, focuses = true) {
    openGroup(row);
    const span = row.find(i);
    at = {row, i};
    const center = () => span.scrollIntoView({block: "center"});
    center();
    // What comes into sight now is drawn, and moves the rest; unless the reader is elsewhere by then
    requestAnimationFrame(() => requestAnimationFrame(() => {
      if (at.row !== row || at.i !== i) return;
      center();
      if (!facts.hidden) show(span, i);
    }));
    document.querySelectorAll(".here").forEach((other) => other.classList.remove("here"));
    span.classList.add("here");
    if (focuses) span.focus({preventScroll: true});
    show(span, i);
  }
  function jump(step) {
    const shown = rows.filter((row) => row.fits && groups[row.group].fits);
    let k = at ? shown.indexOf(at.row) : step > 0 ? 0 : shown.length - 1;
    for (let i = at && at.i; k >= 0 && k < shown.length; k += step, i = null) {
      const left = shown[k].large.filter((j) => i === null || (step > 0 ? j > i : j < i));
      if (left.length) return go(shown[k], step > 0 ? left[0] : left.at(-1));
    }
  }
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") facts.hidden = true;
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select")) return;
    if (event.key === "n" || event.key === "p") jump(event.key === "n" ? 1 : -1);
    const span = event.target.closest?.("[data-first]");
    if (span && span.row && at && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      const i = at.i + (event.key === "ArrowRight" ? 1 : -1);
      if (i >= 0 && i < at.row.length) go(at.row, i);
      event.preventDefault();
    }
  });
  // In a run of several tokens, the one under the pointer
  function tokenAt(span, event) {
    let i = +span.dataset.first;
    const caret = document.caretPositionFromPoint && document.caretPositionFromPoint(event.clientX, event.clientY);
    let left = caret && caret.offsetNode === span.firstChild ? caret.offset : 0;
    while (i < +span.dataset.end - 1 && left >= span.row.text(i).length) left -= span.row.text(i++).length;
    return i;
  }
  for (const kind of ["mousemove", "click"]) {
    addEventListener(kind, (event) => {
      const span = event.target.closest?.("span[data-first], circle");
      if (!span) facts.hidden = true;
      else if (!span.row) show(span);
      else {
        const i = tokenAt(span, event);
        if (kind === "click") at = {row: span.row, i};
        show(span, i);
      }
    });
  }
})();
