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
  },
});
