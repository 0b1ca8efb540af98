// A page (1.49) keeps widgets' values by the node's id and the widget's name, and hands those of a removed node to the next one
// under its id: a Cache Schedule would get DuCa Cache's warmup of -1, which it may not have. Here a node keeps its own.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "DuCa.Values",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("DuCa")) return;
    for (const widget of node.widgets ?? []) {
      const { setNodeId } = widget;
      if (setNodeId) widget.setNodeId = (id) => keepValue(widget, () => setNodeId.call(widget, id));
    }
  },
});

function keepValue(widget, action) {
  const { value } = widget;
  action();
  if (widget.value !== value) widget.value = value;
}
