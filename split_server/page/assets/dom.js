// Builds elements. Text is always set as text, so that a device's name cannot become markup.

const SVG = new Set(["svg", "path", "line", "circle", "rect", "text", "g", "title"]);

// Make an element: h("p", {class: "soft", onclick: f}, "text", child, ...).
export function h(name, attributes = {}, ...children) {
  const element = SVG.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export const card = (title, ...children) =>
  h("section", { class: "card", "aria-label": title }, h("h2", {}, title), ...children);

export const pill = (text, kind = text) => h("span", { class: `pill ${kind}` }, text);

export const number = (text) => h("td", { class: "number" }, text);

export function megabytes(count) {
  const mb = count / 1e6;
  return `${mb >= 100 ? Math.round(mb).toLocaleString("en") : mb.toFixed(2)} MB`;
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;

export const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString("en-GB");

export const day = (seconds) => new Date(1000 * seconds).toLocaleString("en-GB");

let hiding;

// Show an error, or what was done, for some seconds.
export function tell(text, good = false) {
  const box = document.getElementById("message");
  box.textContent = text;
  box.hidden = false;
  box.className = good ? "good" : "";
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.hidden = true; }, good ? 4000 : 12000);
}

// Ask before something that cannot be undone; resolves to whether the person agrees.
export function agreed(question, action) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { "aria-label": question },
      h("p", {}, question),
      h("form", { method: "dialog", class: "buttons" },
        h("button", { value: "no" }, "Keep it"),
        h("button", { value: "yes", class: "danger" }, action)));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
