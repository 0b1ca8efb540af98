// Draws the strip: presets, a cell for each evaluation, lines of text. It gets states and makes elements; it knows no graph and no server.

const KINDS = { F: "full", i: "incremental", c: "conservative", a: "skipped", "-": "by another node" };
const MOST_CELLS = 512; // with more, a cell would be narrower than a pixel
const ANNOUNCE_MS = 1000;

export class StripView {
  /** onPreset: is called with the speedup of a preset button; without it there are no such buttons. */
  constructor({ nodeId, minHeight, onPreset }) {
    this.root = element("div", "duca-strip", { "data-node-id": nodeId, "data-state": "plan" });
    this.root.style.setProperty("--duca-min-height", `${minHeight}px`);
    this.onPreset = onPreset;
    if (onPreset) this.presets = this.root.appendChild(element("div", "duca-presets", { role: "group", "aria-label": "Speed-up presets" }));
    this.cells = this.root.appendChild(element("div", "duca-cells", { role: "img", tabindex: "0", "aria-label": "No plan yet" }));
    this.text = this.root.appendChild(element("div", "duca-text"));
    this.live = this.root.appendChild(element("div", "duca-live", { "aria-live": "polite" }));
    this.cells.addEventListener("keydown", (event) => this.#walk(event));
    this.cells.addEventListener("blur", () => this.#mark(null));
  }

  /** answer: of POST /duca_cache/plan. idle: "muted", "bypassed" or null. */
  showPlan(answer, idle) {
    const kinds = Object.fromEntries((answer.kinds ?? []).map((kind) => [kind.letter, kind]));
    const cells = [...(answer.plan ?? "")].map((kind, step) => ({ kind, title: planTitle(kind, step, answer.steps, kinds[kind]?.meaning) }));
    const counts = countWords(answer.counts);
    this.#setState("plan", idle);
    this.#setCells(cells, `Plan for ${answer.steps} steps: ${counts || "nothing"}.`);
    this.#setLines([keyLine(answer.counts, kinds), ...planLines(answer, idle)]);
    if (this.isAnnouncing) this.announce(this.text.innerText.trim().replaceAll("\n", ". ")); // but not when a workflow is opened
    this.isAnnouncing = true;
  }

  /** Shows a run, during it and after it. run: {plan, steps, evaluations, active, complete, bytes, report}. */
  showRun(run) {
    const cells = run.report ? reportCells(run.report) : runCells(run);
    const done = cells.filter((cell) => cell.done);
    const counts = run.report?.counts ?? countKinds(done);
    const head = run.active ? `Running: evaluation ${done.length} of ${cells.length}` : summary(run, done.length);
    this.#setState(run.active ? "running" : "done", null);
    this.#setCells(cells, `${head}. ${countWords(counts)}.`);
    this.#setLines([keyLine(counts, {}), ...runLines(run, head)]);
    this.announce(head);
  }

  /** Shows why there is no plan. text, position: the wrong character in a schedule's text, if that is the reason. */
  showError({ error, text, position }) {
    this.#setState("error", null);
    this.#setCells([], `No plan: ${error}`);
    const lines = [element("div", "duca-line duca-error", {}, error)];
    if (typeof text === "string" && Number.isInteger(position)) lines.push(markedText(text, position));
    this.#setLines(lines);
    this.announce(error);
  }

  /** Shows a warning above the plan, such as that the server does not answer. Empty words remove it. */
  showNote(words) {
    this.text.querySelector(".duca-note")?.remove();
    this.root.toggleAttribute("data-stale", Boolean(words));
    if (words) this.text.prepend(element("div", "duca-line duca-note duca-warning", {}, words));
  }

  /** presets: [{name, speedup}]; the one that equals `current` is pressed. */
  showPresets(presets, current, isDisabled) {
    if (!this.presets) return;
    const wanted = JSON.stringify(presets);
    if (this.drawnPresets !== wanted) {
      this.drawnPresets = wanted; // only then, as new buttons would lose the keyboard's focus
      this.presets.replaceChildren(...presets.map((preset) => this.#presetButton(preset)));
    }
    for (const button of this.presets.children) {
      button.setAttribute("aria-pressed", String(Math.abs(Number(button.dataset.speedup) - current) < 0.005));
      button.disabled = isDisabled;
    }
  }

  /** Tells screen readers, at most once a second, and then the latest words. isUrgent: at once, as the user pressed a key. */
  announce(words, isUrgent = false) {
    this.pending = words;
    if (isUrgent) {
      this.live.textContent = words;
      this.pending = null;
    } else {
      this.timer ??= setTimeout(() => this.#say(), ANNOUNCE_MS);
    }
  }

  dispose() {
    clearTimeout(this.timer);
  }

  #say() {
    this.timer = undefined;
    if (this.pending && this.pending !== this.live.textContent) this.live.textContent = this.pending;
  }

  #presetButton({ name, speedup }) {
    const button = element("button", "duca-preset", { type: "button", "data-speedup": speedup, title: `speedup ${speedup}` }, name);
    button.addEventListener("click", () => this.onPreset(Number(speedup)));
    return button;
  }

  #setState(state, idle) {
    this.root.dataset.state = state;
    this.root.removeAttribute("data-stale");
    if (idle) this.root.dataset.idle = idle;
    else delete this.root.dataset.idle;
  }

  /** Changes only what differs: during a run this happens at every evaluation. */
  #setCells(all, label) {
    const cells = all.slice(0, MOST_CELLS);
    while (this.cells.children.length > cells.length) this.cells.lastChild.remove();
    while (this.cells.children.length < cells.length) this.cells.append(element("span", "duca-cell"));
    cells.forEach(({ kind, done, title, part }, index) => {
      const cell = this.cells.children[index];
      set(cell, "data-kind", kind);
      set(cell, "data-done", done ? "1" : "0");
      set(cell, "title", title);
      cell.style.setProperty("--duca-part", part ?? 1);
    });
    const rest = all.length - cells.length;
    set(this.root, "data-count", cells.length > 80 ? "many" : "few");
    set(this.cells, "aria-label", `${label}${rest ? ` The first ${MOST_CELLS} are shown.` : ""} Arrow keys read them one by one.`);
  }

  #setLines(lines) {
    const scrolled = this.text.scrollTop;
    this.text.replaceChildren(...lines);
    this.text.scrollTop = scrolled;
  }

  #walk(event) {
    const cells = [...this.cells.children];
    const at = cells.findIndex((cell) => cell.hasAttribute("data-current"));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: cells.length - 1 }[event.key];
    if (to === undefined || !cells.length || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation(); // these keys would move the node on the canvas
    const cell = cells[Math.max(0, Math.min(cells.length - 1, to))];
    this.#mark(cell);
    this.announce(cell.title, true);
  }

  #mark(cell) {
    for (const marked of this.cells.querySelectorAll("[data-current]")) marked.removeAttribute("data-current");
    cell?.setAttribute("data-current", "");
  }
}

/** Passes on the events that zoom and pan the canvas, which an element on it would swallow. In Vue nodes the host does this. */
export function passPointer(root, canvas) {
  const onCanvas = () => root.closest(".dom-widget");
  const pass = (type, method, isMeant) =>
    root.addEventListener(type, (event) => {
      if (onCanvas() && isMeant(event)) canvas[method](event);
    });
  pass("pointerdown", "processMouseDown", (event) => event.button === 1);
  pass("pointermove", "processMouseMove", (event) => (event.buttons & 4) === 4);
  pass("pointerup", "processMouseUp", (event) => event.button === 1);
  root.addEventListener("wheel", (event) => {
    const text = event.target.closest?.(".duca-text");
    const isScrolling = text && text.scrollHeight > text.clientHeight && !event.ctrlKey;
    if (!onCanvas() || isScrolling) return;
    event.preventDefault();
    canvas.processMouseWheel(event);
  });
}

// --- cells

const planTitle = (kind, step, steps, meaning) => `step ${step + 1} of ${steps}: ${KINDS[kind] ?? kind}${meaning ? `, ${meaning}` : ""}`;

/** Cells of the evaluations so far, then of the planned steps to come. A step may have several evaluations. */
function runCells({ plan = "", steps, evaluations }) {
  const done = Array.from(evaluations, (evaluation, index) => {
    const kind = evaluation?.kind ?? plan[index] ?? "F"; // if its message was lost
    return { kind, done: true, title: `evaluation ${index + 1}, step ${(evaluation?.step ?? index) + 1}: ${KINDS[kind] ?? kind}` };
  });
  const next = (evaluations.at(-1)?.step ?? done.length - 1) + 1;
  const coming = [...plan.slice(next)].map((kind, index) => ({ kind, title: `${planTitle(kind, next + index, steps)}, still to come` }));
  return [...done, ...coming];
}

function reportCells({ evaluations }) {
  const longest = Math.max(...evaluations.map(({ ms }) => ms ?? 0));
  return evaluations.map(({ step, kind, planned, ms }, index) => {
    const instead = planned && planned !== kind ? ` (planned ${KINDS[planned] ?? planned})` : "";
    const time = Number.isFinite(ms) ? `, ${milliseconds(ms)}` : "";
    const title = `evaluation ${index + 1}, step ${step + 1}: ${KINDS[kind] ?? kind}${instead}${time}`;
    return { kind, done: true, title, part: longest > 0 && Number.isFinite(ms) ? ms / longest : 1 };
  });
}

function countKinds(cells) {
  const counts = {};
  for (const { kind } of cells) counts[kind] = (counts[kind] ?? 0) + 1;
  return counts;
}

// --- words

const used = (counts) => Object.entries(counts ?? {}).filter(([, count]) => count > 0);
const countWords = (counts) => used(counts).map(([kind, count]) => `${count} ${KINDS[kind] ?? kind}`).join(", ");
const times = (ratio) => `${ratio.toFixed(2)}×`;
const milliseconds = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`);
const line = (parts, className = "") => {
  const words = parts.filter(Boolean).join(" · ");
  return words ? [element("div", `duca-line ${className}`, {}, words)] : [];
};

export function bytesText(bytes) {
  const unit = ["bytes", "KiB", "MiB", "GiB"][Math.min(3, Math.floor(Math.log2(Math.max(1, bytes)) / 10))];
  const value = bytes / { bytes: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 }[unit];
  return `${value.toFixed(unit === "bytes" || value >= 100 ? 0 : value < 10 ? 2 : 1)} ${unit}`;
}

function planLines(answer, idle) {
  const { speedup, compute, cache_bytes: bytes, calibration, quality, steps } = answer;
  const estimated = answer.is_counted === false ? "estimated, as the model has not run yet" : "";
  return [
    ...line([idle && `this node is ${idle} and has no effect`], "duca-warning"),
    ...line([
      speedup != null && `expected ${times(speedup)} as fast`,
      compute != null && `${Math.round(compute * 100)} % of the compute`,
      bytes != null ? `cache ${bytesText(bytes)}` : "cache size known after a run",
    ]),
    ...line([calibration?.text, !calibration?.text?.startsWith(quality) && quality]),
    ...line([estimated, answer.assumed_steps && `no sampler found, ${steps} steps assumed`]),
    ...(answer.notes ?? []).flatMap((note) => line([note], "duca-warning")),
  ];
}

function summary({ complete, report, evaluations }, done) {
  if (complete === false) return `Stopped after ${done} evaluations`;
  const speedup = report?.time_speedup;
  return speedup ? `Took ${milliseconds(report.total_ms)}, ${times(speedup)} as fast` : `Done, ${done || evaluations.length} evaluations`;
}

function runLines({ active, bytes, report }, head) {
  if (active) return line([head, bytes != null && `cache ${bytesText(bytes)}`]);
  if (!report) return line([head]);
  const planned = report.predicted_bytes != null && report.predicted_bytes !== report.peak_bytes;
  return [
    ...line([head, report.compute_speedup && `${times(report.compute_speedup)} less compute`]),
    ...line([
      report.peak_bytes != null && `cache ${bytesText(report.peak_bytes)}`,
      planned && `predicted ${bytesText(report.predicted_bytes)}`,
      report.setting,
    ]),
    ...line([report.place]),
    ...(report.notices ?? []).flatMap((notice) => line([notice], "duca-warning")),
  ];
}

/** The counts, each with its colour, which is also the legend. */
function keyLine(counts, kinds) {
  const row = element("div", "duca-line");
  for (const [letter, count] of used(counts)) {
    if (row.childNodes.length) row.append(", ");
    const key = row.appendChild(element("span", "duca-key", { title: kinds[letter]?.meaning ?? "" }));
    key.append(element("span", "duca-swatch", { "data-kind": letter, "aria-hidden": "true" }), `${count} ${KINDS[letter] ?? letter}`);
  }
  return row;
}

function markedText(text, position) {
  const row = element("div", "duca-line duca-input", { "aria-label": `${text}, wrong at character ${position + 1}` });
  row.append(text.slice(0, position), element("mark", "", {}, text[position] ?? "␣"), text.slice(position + 1));
  return row;
}

// --- elements

function element(tag, className, attributes = {}, words = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (words) made.textContent = words; // not as markup, as texts come from files and from the user
  return made;
}

function set(target, name, value) {
  if (target.getAttribute(name) !== value) target.setAttribute(name, value);
}
