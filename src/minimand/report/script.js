(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  all(".needs-js").forEach((part) => { part.hidden = false; });
  all(".without-js").forEach((part) => { part.hidden = true; });

  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  label();

  // A switch shows the parts that carry its choice and hides the others of its kind.
  all("[data-switch]").forEach((group) => {
    const kind = group.dataset.switch;
    const show = () => {
      const chosen = group.querySelector("input:checked").value;
      all(`[data-${kind}]`).forEach((part) => { part.hidden = part.dataset[kind] !== chosen; });
    };
    group.addEventListener("change", (event) => {
      show();
      event.target.parentElement.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    show();
  });

  const key = (row, column) => row.querySelector(`[data-key="${column}"]`).dataset.value;
  const compare = (a, b, words) => (words ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  all("table.sortable").forEach((table) => {
    all("thead button", table).forEach((button) => {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const { column, first, words } = button.dataset;
        const turned = { ascending: "descending", descending: "ascending" };
        const order = turned[head.getAttribute("aria-sort")] || first;
        all("[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const rows = all("tbody tr", table).map((row) => [key(row, column), row]);
        // A contender without a number stays last, whichever way the table is sorted.
        rows.sort(([a], [b]) => (a === "") - (b === "") || (order === "ascending" ? 1 : -1) * compare(a, b, words));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  });

  const copy = document.getElementById("copy");
  copy?.addEventListener("click", async () => {
    const code = document.getElementById("code");
    let done = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    document.getElementById("copied").textContent = done ? "Copied" : "Press Ctrl+C to copy";
  });
})();
