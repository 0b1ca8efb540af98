// The strip under DuCa Cache and Cache Schedule. It shows the plan for the settings, a run while it goes on, and its result.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { CACHE, SCHEDULE, cacheOf, executionIds, idleState, isLinked, planRequest } from "./duca_graph.js";
import { StripView, passPointer } from "./duca_view.js";

const MARGIN = 8;
const HEIGHT = { [CACHE]: 155, [SCHEDULE]: 128 }; // fixed, as workflows save it, and heights of texts differ between machines
const WIDTH = 300; // of a new node
const DEBOUNCE_MS = 80;
const PATIENCE_MS = 400; // how long a newer request waits for an earlier one; else a drag on a slow server would show nothing
const SILENCE_MS = 20000; // after so long without a message, the server is asked about a run

const strips = new Set(); // strips of nodes that are in a graph
const runs = new Map(); // runs that go on, by the node's id on the server
const askedAbout = new Set(); // nodes whose run the server is being asked about

class Strip {
  constructor(node) {
    this.node = node;
    const onPreset = node.comfyClass === CACHE ? (speedup) => this.setSpeedup(speedup) : undefined;
    this.view = new StripView({ nodeId: node.id, minHeight: HEIGHT[node.comfyClass], onPreset });
    this.asked = 0; // number of requests, by which a late answer is recognised
    this.presets = [];
  }

  /** Asks for a new plan if anything that it depends on has changed, and then stops showing the result of a run. */
  check() {
    if (this.node.graph) this.#guarded(() => this.#look());
  }

  #look() {
    this.view.root.dataset.nodeId = this.node.id; // known only once the node is in a graph
    this.#settle();
    const request = planRequest(this.node);
    const idle = idleState(this.node);
    const wanted = JSON.stringify([request, idle]);
    if (wanted === this.wanted) return;
    Object.assign(this, { wanted, request, idle });
    if (this.run) Object.assign(this, { run: null, left: this.run });
    this.#showPresets();
    this.askSoon();
  }

  /** Runs an action. If it fails, the strip says so, and the console once; the other strips go on. */
  #guarded(action) {
    try {
      const result = action();
      this.hasFailed = false;
      return result;
    } catch (error) {
      if (!this.hasFailed) console.error("DuCa strip:", error);
      this.hasFailed = true;
      this.view.showNote("The workflow around this node could not be read; the plan may be out of date.");
      return undefined;
    }
  }

  /** Replaces the element of an earlier node of this id (after undo, or in another workflow), which Vue nodes go on showing. */
  #settle() {
    if (this.view.root.isConnected) return;
    const current = new Set([...strips].map((strip) => strip.view.root));
    for (const old of document.querySelectorAll(`.duca-strip[data-node-id="${this.node.id}"]`)) {
      if (!current.has(old) && !old.closest(".dom-widget")) return void old.replaceWith(this.view.root);
    }
  }

  /** Asks for a plan after a delay. Further changes do not prolong it, so that the strip follows a slider while it moves. */
  askSoon(delay = DEBOUNCE_MS) {
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      const age = performance.now() - (this.sent ?? 0);
      if (this.inFlight && age < PATIENCE_MS) this.isAskingAgain = true;
      else this.#ask();
    }, delay);
  }

  async #ask() {
    this.inFlight?.abort();
    const [abort, number] = [new AbortController(), ++this.asked];
    Object.assign(this, { inFlight: abort, sent: performance.now(), isAskingAgain: false });
    try {
      const answer = await post("/duca_cache/plan", this.request, abort.signal);
      if (number === this.asked) this.#take(answer);
    } catch (error) {
      if (number === this.asked && error.name !== "AbortError") this.#missing();
    }
    if (number !== this.asked) return;
    this.inFlight = null;
    if (this.isAskingAgain) this.#ask();
  }

  #take(answer) {
    this.answer = answer;
    if (answer.presets) this.presets = answer.presets;
    if (!this.run) this.#showPlan();
    this.#showPresets();
  }

  /** The server does not answer, or not as expected: what is shown stays. */
  #missing() {
    if (!this.run) this.view.showNote("The server does not answer; the plan may be out of date.");
  }

  #showPlan() {
    const { error, input, position } = this.answer ?? {};
    if (error) this.view.showError({ error, position, text: this.request.schedule?.[input] });
    else if (this.answer) this.view.showPlan(this.answer, this.idle);
    else this.askSoon();
  }

  #showPresets() {
    const speedup = this.node.widgets?.find((widget) => widget.name === "speedup")?.value;
    this.view.showPresets(this.presets, speedup, isLinked(this.node, "speedup"));
  }

  follows(id) {
    const cache = this.node.graph && this.#guarded(() => cacheOf(this.node));
    return Boolean(cache) && executionIds(cache).includes(id);
  }

  /** Shows a run of this node. After the user has changed settings, that run is not shown again. */
  showRun(run) {
    if (run === this.left) return;
    if (run !== this.run) this.check(); // so that earlier changes, not yet seen, do not hide the run
    this.run = run;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      if (this.run) this.view.showRun(this.run);
    });
  }

  /** Shows the plan again in place of a run of which nothing more is known. */
  dropRun(run) {
    if (this.run !== run) return;
    this.run = null;
    this.#showPlan();
  }

  setSpeedup(value) {
    const { node } = this;
    const widget = node.widgets?.find((candidate) => candidate.name === "speedup");
    if (!widget) return;
    const before = widget.value;
    app.canvas?.emitBeforeChange?.(); // with these two events the change can be undone, and the workflow counts as changed
    try {
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
      node.onWidgetChanged?.(widget.name, value, before, widget);
    } finally {
      app.canvas?.emitAfterChange?.();
    }
    node.setDirtyCanvas?.(true, true);
    checkAll();
  }

  /** Is called when the node enters a graph, again after a move into a subgraph. */
  enter() {
    strips.add(this);
    setTimeout(() => this.join());
  }

  /** Shows the run that goes on already. What a workflow has loaded meanwhile is no change by the user. */
  join() {
    this.check();
    this.left = null;
    for (const run of runs.values()) if (this.follows(run.node)) this.showRun(run);
  }

  leave() {
    strips.delete(this);
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frame);
    this.inFlight?.abort();
    this.view.dispose();
    Object.assign(this, { timer: undefined, frame: undefined, wanted: undefined, asked: this.asked + 1, inFlight: null });
  }
}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await api.fetchApi(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const answer = await response.json();
  if (!response.ok && !answer.error) throw new Error(`status ${response.status}`);
  return answer;
}

function checkAll() {
  for (const strip of strips) strip.check();
}

// --- runs

function onRun({ detail }) {
  const { event, node, run: number } = detail;
  const known = runs.get(node);
  if (event === "start") return update({ ...detail, evaluations: [], active: true });
  if (known?.run !== number) return void resync(node); // the page was opened or reconnected during it
  if (event === "evaluation") {
    known.evaluations[detail.index] = { step: detail.step, kind: detail.kind };
    known.bytes = detail.bytes ?? known.bytes;
    update(known);
  } else if (event === "end") {
    finish(known, detail);
  }
}

function update(run) {
  run.heard = performance.now();
  runs.set(run.node, run);
  for (const strip of strips) if (strip.follows(run.node)) strip.showRun(run);
}

function finish(run, { complete, report }) {
  Object.assign(run, { active: false, complete, report });
  update(run);
  runs.delete(run.node);
  for (const strip of strips) strip.askSoon(); // with the run, the server may have learned the model
}

/** Asks for the state of a node's run. A run of another tab is ignored; one that the server does not know is over. */
async function resync(node) {
  if (askedAbout.has(node) || ![...strips].some((strip) => strip.follows(node))) return;
  const known = runs.get(node);
  askedAbout.add(node);
  const found = await runOf(node);
  askedAbout.delete(node);
  const isOurs = !found?.client_id || found.client_id === (api.clientId ?? found.client_id);
  if (known && runs.get(node) !== known) return; // events came meanwhile
  const isSame = known && found?.run === known.run;
  if (found?.active && isOurs) update(Object.assign(isSame ? known : {}, found, { node, evaluations: found.evaluations ?? [] }));
  else if (isSame) finish(known, { complete: found.report?.complete ?? false, report: found.report });
  else if (known) {
    runs.delete(node);
    for (const strip of strips) strip.dropRun(known);
  }
}

async function runOf(node) {
  try {
    const response = await api.fetchApi(`/duca_cache/run?node_id=${encodeURIComponent(node)}`);
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

/** Finds runs after a reload. Asks only if something runs, as browsers write every 404 to their console. */
async function findRuns() {
  try {
    const queue = await (await api.fetchApi("/prompt")).json();
    if (!queue.exec_info?.queue_remaining) return;
  } catch {
    return;
  }
  const caches = [...strips].filter((strip) => strip.node.comfyClass === CACHE);
  for (const id of new Set(caches.flatMap((strip) => executionIds(strip.node)))) if (!runs.has(id)) resync(id);
}

function onSilence() {
  for (const run of runs.values()) if (performance.now() - run.heard > SILENCE_MS) resync(run.node);
}

// --- connecting a strip to its node

function attach(node) {
  const strip = new Strip(node);
  const widget = node.addDOMWidget("duca_strip", "duca_strip", strip.view.root, {
    serialize: false, // not sent with a prompt
    hideInPanel: true, // the properties panel would take the element away from the node
    margin: MARGIN,
    getMinHeight: () => HEIGHT[node.comfyClass] + 2 * MARGIN,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // nor saved in the workflow
  for (const other of node.widgets) if (other !== widget) chain(other, "callback", checkAll);
  chain(node, "onConnectionsChange", () => setTimeout(checkAll)); // the link changes after this event
  chain(node, "onAdded", () => strip.enter());
  chain(node, "onRemoved", () => strip.leave());
  passPointer(strip.view.root, app.canvas);
  node.setSize([Math.max(WIDTH, node.size[0]), node.computeSize()[1]]); // the page sets the size of a saved node later
}

function chain(target, name, also) {
  const before = target[name];
  target[name] = function (...given) {
    const result = before?.apply(this, given);
    also();
    return result;
  };
}

api.addEventListener("duca_cache.run", onRun); // not in setup: after a reload, messages of a run come earlier

app.registerExtension({
  name: "DuCa.Strip",
  setup() {
    const style = { rel: "stylesheet", href: new URL("./duca_strip.css", import.meta.url).href };
    document.head.append(Object.assign(document.createElement("link"), style));
    api.addEventListener("graphChanged", checkAll); // on changes that the host saves for undo: other nodes' settings, links, modes
    api.addEventListener("reconnected", () => {
      for (const strip of strips) strip.askSoon();
      for (const node of runs.keys()) resync(node);
    });
    setInterval(onSilence, SILENCE_MS / 2);
  },
  nodeCreated(node) {
    if (node.comfyClass === CACHE || node.comfyClass === SCHEDULE) attach(node);
  },
  afterConfigureGraph() {
    for (const strip of strips) strip.join();
    findRuns();
  },
});
