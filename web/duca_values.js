// Lets a new node keep its own values. The page (1.49) keeps widgets' values by the node's id and the widget's name, and gives those of a
// removed node to the next one with its id: a Cache Schedule would get DuCa Cache's warmup of -1, which is not allowed there.
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
