"use strict";
// Tables sort and figures enlarge. Without this script the page shows the same: tables as written, figures as links.

const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

// What a cell is sorted by: its number in a column of numbers, else its text; null where it has nothing.
function keyOf(cell, isNumber) {
  if (isNumber) return cell.dataset.sort ? Number(cell.dataset.sort) : null;
  const text = cell.textContent.trim();
  return text === "" || text === "–" ? null : text;
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // last in either direction
  return sign * (typeof a === "number" ? (a > b) - (a < b) : words.compare(a, b));
}

// Each press takes the next of: ascending, descending, as written.
function sortBy(table, written, head) {
  const before = head.getAttribute("aria-sort");
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  let rows = written;
  if (before !== "descending") {
    const order = before === "ascending" ? "descending" : "ascending";
    const key = (row) => keyOf(row.cells[head.cellIndex], head.classList.contains("number"));
    rows = written
      .map((row) => [key(row), row])
      .sort(([a], [b]) => compare(a, b, order === "ascending" ? 1 : -1))
      .map(([, row]) => row);
    head.setAttribute("aria-sort", order);
  }
  table.tBodies[0].append(...rows);
}

function makeSortable(table) {
  const written = [...table.tBodies[0].rows];
  if (written.length < 2) return;
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, written, head));
    head.append(button);
  }
}

// One dialog serves all figures. It shows the drawing for wide pages, which a phone then pans.
function makeDialog() {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  const holder = document.createElement("div");
  dialog.append(close, holder);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    if (!dialog.open) holder.replaceChildren(); // it may be open again: the event comes later
  });
  document.body.append(dialog);
  return (picture) => {
    const copy = picture.cloneNode(true);
    for (const source of copy.querySelectorAll('source[media*="max-width"]')) source.remove();
    holder.replaceChildren(copy);
    dialog.setAttribute("aria-label", copy.querySelector("img").alt);
    dialog.showModal();
    dialog.scrollTo(0, 0);
  };
}

function makeEnlargeable(link, enlarge) {
  link.setAttribute("role", "button");
  link.setAttribute("aria-haspopup", "dialog");
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window, as of any link
    event.preventDefault();
    enlarge(link.querySelector("picture"));
  });
  link.addEventListener("keydown", (event) => {
    if (event.key !== " ") return;
    event.preventDefault();
    link.click();
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
const enlarge = makeDialog();
document.querySelectorAll("a.enlarge").forEach((link) => makeEnlargeable(link, enlarge));
