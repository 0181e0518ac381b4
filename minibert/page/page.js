"use strict";

// A column's header sorts the table by it: first downward for numbers, upward for words; again turns it round.
// What was not measured stays at the end.
function sortBy(table, header) {
  const column = [...header.parentNode.children].indexOf(header);
  const numeric = header.classList.contains("number");
  const now = header.getAttribute("aria-sort");
  const downward = now === "none" ? numeric : now === "ascending";
  const value = (row) => row.children[column].dataset.value;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
    return downward ? -order : order;
  });
  table.tBodies[0].append(...rows);
  for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", downward ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].children) {
    header.querySelector("button").addEventListener("click", () => sortBy(table, header));
  }
}

// A backend in the legend shows that one alone; once more shows all.
const buttons = [...document.querySelectorAll(".legend button")];

function showAlone(chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
  for (const mark of document.querySelectorAll("main .mark")) {
    mark.classList.toggle("faint", Boolean(chosen) && mark.dataset.colour !== chosen.dataset.colour);
  }
  for (const row of document.querySelectorAll("#op-table tbody tr")) {
    row.hidden = Boolean(chosen) && row.dataset.name !== chosen.dataset.name;
  }
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    showAlone(button.getAttribute("aria-pressed") === "true" ? null : button);
  });
}
