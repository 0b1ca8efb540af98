// Shows what the pack has to say (nodes/page/notices.py) as a toast. Once per notice is the server's business.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

app.registerExtension({
  name: "DuCa.Notices",
  setup() {
    api.addEventListener("duca_cache.notice", ({ detail }) => {
      app.extensionManager.toast.add({ severity: "info", summary: "DuCa", detail: detail.text, life: 8000 });
    });
  },
});
