// Folds rare settings away on the canvas, until "Show Advanced" in the node's menu. The page (1.32) keeps the
// server's `advanced` in the widget's options, but draws by the widget's own flag and leaves room for what it does not draw.
import { app } from "../../scripts/app.js";

const FOLDED = ["DuCaCache", "DuCaSVDCalibrator"];

app.registerExtension({
  name: "DuCa.Advanced",
  nodeCreated(node) {
    if (!FOLDED.includes(node.comfyClass)) return;
    for (const widget of node.widgets ?? []) {
      if (!widget.options?.advanced) continue;
      widget.advanced = true;
      widget.computeSize = (width) => [width ?? 0, node.showAdvanced ? LiteGraph.NODE_WIDGET_HEIGHT : -4]; // -4 takes the gap back
    }
    node.setSize([node.size[0], node.computeSize()[1]]); // a saved node gets its own size after this
    keepTheRest(node);
  },
});

/** The page lets a node grow for what it shows, but does not shrink it for what it hides: both by the same height. */
function keepTheRest(node) {
  const { toggleAdvanced } = node;
  node.toggleAdvanced = function (...given) {
    const [height, least] = [this.size[1], this.computeSize()[1]];
    toggleAdvanced?.apply(this, given);
    if (!LiteGraph.vueNodesMode) this.setSize([this.size[0], height + this.computeSize()[1] - least]);
  };
}
