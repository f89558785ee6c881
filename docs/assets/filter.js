// Filters a table's rows by the words typed: every word must occur in the row or in its data-words.
document.addEventListener("input", (event) => {
  const table = event.target.dataset && document.getElementById(event.target.dataset.filter);
  if (!table) return;
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of table.tBodies[0].rows) {
    const text = (row.textContent + " " + (row.dataset.words || "")).toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
});
