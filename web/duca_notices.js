// Shows the notices of nodes/page/notices.py as toasts. The server sends each notice once.
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
