// Chooses what to show by the address: #/ the runs, #/new a new run, #/run/ID one run.

import { call } from "./api.js";
import { h, tell } from "./dom.js";
import { showLogin } from "./login.js";
import { showNew } from "./new.js";
import { showRun } from "./run.js";
import { showRuns } from "./runs.js";

const main = document.getElementById("main");
const nav = document.getElementById("nav");

let leave = () => {};

async function show() {
  leave();
  leave = () => {};
  const [, page, id] = location.hash.split("/");
  const body = h("div", {});
  try {
    await call("GET", "v1/session"); // others may read the list of runs, too
    nav.hidden = false;
    if (page === "run") leave = await showRun(body, decodeURIComponent(id ?? ""));
    else if (page === "new") leave = await showNew(body);
    else leave = await showRuns(body);
  } catch (error) {
    body.replaceChildren();
    if (error.status === 401) {
      nav.hidden = true;
      showLogin(body, show);
    } else {
      body.append(h("h1", {}, "This does not work"), h("p", {}, error.message),
        h("p", {}, h("a", { href: "#/" }, "To the runs")));
    }
  }
  main.replaceChildren(body);
  main.querySelector("h1")?.setAttribute("tabindex", "-1");
  (main.querySelector("[autofocus]") ?? main.querySelector("h1"))?.focus();
}

document.getElementById("logout").addEventListener("click", async () => {
  try {
    await call("DELETE", "v1/session");
  } catch (error) {
    tell(error.message);
  }
  show();
});
addEventListener("hashchange", show);
show();
