// Asks for the operator token.

import { call } from "./api.js";
import { h, tell } from "./dom.js";

export function showLogin(body, done) {
  const token = h("input", { id: "token", type: "password", autocomplete: "current-password",
    required: true, autofocus: true });
  const form = h("form", { class: "card" },
    h("h1", {}, "Log in"),
    h("label", { for: "token" }, "Operator token"), token,
    h("p", { class: "soft small" },
      "It is in the file operator.token of the server's data folder."),
    h("div", { class: "buttons" }, h("button", { class: "main" }, "Log in")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await call("POST", "v1/session", { token: token.value.trim() });
      await done();
    } catch (error) {
      tell(error.message);
      token.select();
    }
  });
  body.append(form);
}
