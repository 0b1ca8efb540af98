// Reads from the graph what the server needs to make a plan. Changes nothing, knows no DOM.

export const CACHE = "DuCaCache";
export const SCHEDULE = "DuCaCacheSchedule";
const CALIBRATION = "DuCaLoadCalibration";

const MUTED = 2;
const BYPASSED = 4;
const SUBGRAPH_INPUT = "-10"; // the page's ids for the inputs and outputs of a subgraph; numbers in some versions, strings in others
const SUBGRAPH_OUTPUT = "-20";
const MAX_HOPS = 100; // links can form a circle
const MAX_NODES = 300;

/** The body of POST /duca_cache/plan for a DuCa Cache or a Cache Schedule node. */
export function planRequest(node) {
  const cache = cacheOf(node);
  const schedule = node.comfyClass === SCHEDULE ? node : linkedNode(cache, "schedule", SCHEDULE);
  const calibration = linkedNode(cache, "calibration", CALIBRATION) ?? linkedNode(schedule, "calibration", CALIBRATION);
  return {
    node_id: executionIds(cache ?? node)[0] ?? String(node.id),
    cache: cache ? widgetValues(cache) : {},
    schedule: schedule ? widgetValues(schedule) : null,
    calibration: (calibration && valueOf(calibration, "calibration_name")) ?? null,
    sampling: cache ? samplingAfter(cache) : {},
  };
}

/** The DuCa Cache node that a strip is about: the node itself, or the first one that gets the schedule. */
export function cacheOf(node) {
  if (node.comfyClass === CACHE) return node;
  for (const target of targetsOf(node, 0)) if (target.node.comfyClass === CACHE) return target.node;
  return null;
}

/** "muted" or "bypassed" if the node, or a subgraph around it, does not run; else null. */
export function idleState(node) {
  for (let at = node; at; at = instanceOf(at.graph)) {
    if (at.mode === MUTED) return "muted";
    if (at.mode === BYPASSED) return "bypassed";
  }
  return null;
}

/** The node's ids on the server: "5", or "12:5" in a subgraph; several if the subgraph is used more than once. */
export function executionIds(node) {
  const graph = node.graph;
  return graph ? [...pathsTo(graph, rootOf(graph), "", 0)].map((path) => path + node.id) : [];
}

/** A widget's value, also if it comes over a link from a primitive or from outside a subgraph; undefined if only a run shows it. */
export function valueOf(node, name) {
  const index = (node.inputs ?? []).findIndex((input) => input.widget?.name === name);
  if (index >= 0 && linkInto(node, index)) return givenValue(sourceOf(node, index));
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

export function isLinked(node, name) {
  return (node.inputs ?? []).some((input, index) => input.widget?.name === name && Boolean(linkInto(node, index)));
}

function widgetValues(node) {
  const saved = (node.widgets ?? []).filter((widget) => widget.serialize !== false);
  return Object.fromEntries(saved.map((widget) => [widget.name, valueOf(node, widget.name)]));
}

function givenValue(source) {
  if (!source) return undefined;
  const { node, promoted } = source;
  if (promoted !== undefined) {
    const input = node.inputs[promoted];
    return node.widgets?.find((widget) => widget.name === (input.widget?.name ?? input.name))?.value;
  }
  const widget = node.widgets?.find((candidate) => candidate.name === "value");
  return (widget ?? (String(node.type).startsWith("Primitive") ? node.widgets?.[0] : undefined))?.value;
}

function linkedNode(node, inputName, comfyClass) {
  const index = (node?.inputs ?? []).findIndex((input) => input.name === inputName);
  const source = index < 0 ? null : sourceOf(node, index);
  return source?.node.comfyClass === comfyClass ? source.node : null;
}

// --- sampling: the nodes that the model goes to

/** Follows the model to the first sampler and reads its settings, also those of nodes connected to it (sigmas, sampler, latent). */
function samplingAfter(cache) {
  const found = {};
  const queue = [cache];
  const seen = new Set(queue);
  while (queue.length && seen.size < MAX_NODES && !(found.steps && found.width)) {
    for (const node of nextNodes(queue.shift())) {
      if (seen.has(node)) continue;
      seen.add(node);
      queue.push(node);
      readSampler(node, found);
    }
  }
  return found;
}

function* nextNodes(node) {
  for (const [slot, output] of (node.outputs ?? []).entries()) {
    if (!["MODEL", "GUIDER", "SIGMAS"].includes(output.type)) continue;
    for (const target of targetsOf(node, slot)) yield target.node;
  }
}

function readSampler(node, found) {
  take(node, ["steps", "sampler_name", "scheduler", "denoise", "start_at_step", "end_at_step"], found);
  for (const [index, input] of (node.inputs ?? []).entries()) {
    if (input.type === "SIGMAS" || input.type === "SAMPLER") {
      const source = sourceOf(node, index);
      if (source?.node) take(source.node, ["steps", "sampler_name", "scheduler", "denoise"], found);
    }
    if (input.type === "LATENT") readLatent(sourceOf(node, index), found, 0);
  }
}

/** Follows latents and images back to the node that sets their size. */
function readLatent(source, found, hops) {
  const node = source?.node;
  if (!node || found.width || hops > MAX_HOPS) return;
  take(node, ["width", "height", "batch_size"], found);
  if (found.width) return;
  const picture = node.imgs?.[0]; // if it loads an image
  if (picture?.naturalWidth) {
    Object.assign(found, { width: picture.naturalWidth, height: picture.naturalHeight });
    return;
  }
  for (const [index, input] of (node.inputs ?? []).entries()) {
    if (["LATENT", "IMAGE"].includes(input.type)) readLatent(sourceOf(node, index), found, hops + 1);
  }
}

function take(node, names, found) {
  for (const name of names) {
    const value = valueOf(node, name);
    if (found[name] === undefined && ["number", "string"].includes(typeof value)) found[name] = value;
  }
}

// --- links: the next node that computes something, in either direction

const linksOf = (graph) => [...(graph?.links?.values?.() ?? [])]; // slots have them too, but newer pages warn if they are read there
// not node.getInputLink: for the node of a subgraph it looks among the outputs
const linkInto = (node, slot) => linksOf(node.graph).find((link) => String(link.target_id) === String(node.id) && link.target_slot === slot);
const linksOutOf = (graph, id, slot) => linksOf(graph).filter((link) => String(link.origin_id) === String(id) && link.origin_slot === slot);
const isSubgraph = (node) => Boolean(node.subgraph);
const isReroute = (node) => node.type === "Reroute";
const tunnelName = (node) => node.widgets?.[0]?.value; // SetNode and GetNode are of widespread packs

/** The source of an input: {node, slot}, or {node, promoted} if it is a widget of the subgraph's node; null if there is none. */
function sourceOf(node, index, hops = 0) {
  const link = linkInto(node, index);
  return link && hops < MAX_HOPS ? originOf(node.graph, link, hops + 1) : null;
}

function originOf(graph, link, hops) {
  if (String(link.origin_id) === SUBGRAPH_INPUT) {
    const outer = instanceOf(graph);
    if (!outer) return null;
    return linkInto(outer, link.origin_slot) ? sourceOf(outer, link.origin_slot, hops) : { node: outer, promoted: link.origin_slot };
  }
  const node = graph.getNodeById(link.origin_id);
  return node && node.mode !== MUTED ? behindOutput(node, link.origin_slot, hops) : null;
}

function behindOutput(node, slot, hops) {
  if (node.mode === BYPASSED) {
    const index = partner(node.inputs, node.outputs?.[slot]?.type, slot);
    return index < 0 ? null : sourceOf(node, index, hops);
  }
  if (isReroute(node)) return sourceOf(node, 0, hops);
  if (node.type === "GetNode") {
    const setter = nodesOf(node.graph).find((other) => other.type === "SetNode" && tunnelName(other) === tunnelName(node));
    return setter ? sourceOf(setter, 0, hops) : null;
  }
  if (!isSubgraph(node)) return { node, slot };
  const inner = linksOf(node.subgraph).find((link) => String(link.target_id) === SUBGRAPH_OUTPUT && link.target_slot === slot);
  return inner && hops < MAX_HOPS ? originOf(node.subgraph, inner, hops + 1) : null;
}

function* targetsOf(node, slot, hops = 0) {
  for (const link of linksOutOf(node.graph, node.id, slot)) yield* arrivalsOf(node.graph, link, hops + 1);
}

function* arrivalsOf(graph, link, hops) {
  if (hops > MAX_HOPS) return;
  if (String(link.target_id) === SUBGRAPH_OUTPUT) {
    const outer = instanceOf(graph);
    if (outer) yield* targetsOf(outer, link.target_slot, hops);
    return;
  }
  const node = graph.getNodeById(link.target_id);
  if (node && node.mode !== MUTED) yield* beyondInput(node, link.target_slot, hops);
}

function* beyondInput(node, slot, hops) {
  if (node.mode === BYPASSED) {
    const index = partner(node.outputs, node.inputs?.[slot]?.type, slot);
    if (index >= 0) yield* targetsOf(node, index, hops);
  } else if (isReroute(node)) {
    yield* targetsOf(node, 0, hops);
  } else if (node.type === "SetNode") {
    for (const getter of nodesOf(node.graph)) {
      if (getter.type === "GetNode" && tunnelName(getter) === tunnelName(node)) yield* targetsOf(getter, 0, hops);
    }
  } else if (isSubgraph(node)) {
    for (const link of linksOutOf(node.subgraph, SUBGRAPH_INPUT, slot)) yield* arrivalsOf(node.subgraph, link, hops + 1);
  } else {
    yield { node, slot };
  }
}

/** The slot beyond a bypassed node that a value goes to: the same number if its type fits, else the first of the type. */
function partner(slots, type, index) {
  return slots?.[index]?.type === type ? index : (slots ?? []).findIndex((slot) => slot.type === type);
}

// --- subgraphs

const nodesOf = (graph) => graph?.nodes ?? graph?._nodes ?? [];
const rootOf = (graph) => graph.rootGraph ?? graph;

/** The (first) node that stands for a subgraph in the graph around it; null for the outermost graph. */
function instanceOf(graph, within = graph && rootOf(graph), depth = 0) {
  if (!graph || graph === within || depth > MAX_HOPS) return null;
  for (const node of nodesOf(within)) {
    if (node.subgraph === graph) return node;
    const deeper = isSubgraph(node) ? instanceOf(graph, node.subgraph, depth + 1) : null;
    if (deeper) return deeper;
  }
  return null;
}

function* pathsTo(graph, within, path, depth) {
  if (graph === within) yield path;
  if (depth > MAX_HOPS) return;
  for (const node of nodesOf(within)) if (isSubgraph(node)) yield* pathsTo(graph, node.subgraph, `${path}${node.id}:`, depth + 1);
}
