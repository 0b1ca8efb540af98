// Hides advanced settings on the canvas until "Show Advanced" is chosen in the node's menu. The page (1.32) keeps the server's
// `advanced` in the widget's options, but looks at the widget's own flag, and leaves room for widgets that it does not draw.
import { app } from "../../scripts/app.js";

const FOLDED = ["DuCaCache", "DuCaSVDCalibrator"];

app.registerExtension({
  name: "DuCa.Advanced",
  nodeCreated(node) {
    if (!FOLDED.includes(node.comfyClass)) return;
    for (const widget of node.widgets ?? []) {
      if (!widget.options?.advanced) continue;
      widget.advanced = true;
      widget.computeSize = (width) => [width ?? 0, node.showAdvanced ? LiteGraph.NODE_WIDGET_HEIGHT : -4]; // -4 removes the gap
    }
    node.setSize([node.size[0], node.computeSize()[1]]); // the page sets the size of a saved node later
    keepTheRest(node);
  },
});

/** Makes the node grow and shrink by the same height. The page lets it grow for widgets it shows, but does not shrink it again. */
function keepTheRest(node) {
  const { toggleAdvanced } = node;
  node.toggleAdvanced = function (...given) {
    const [height, least] = [this.size[1], this.computeSize()[1]];
    toggleAdvanced?.apply(this, given);
    if (!LiteGraph.vueNodesMode) this.setSize([this.size[0], height + this.computeSize()[1] - least]);
  };
}
