// Tables of results, which pandas writes without a thought for how columns lie.
document.addEventListener("DOMContentLoaded", () => {
  const number = /^\s*[-+−–±<≤≈]?\s*(\d|nan$|$|–$)/i;
  for (const table of document.querySelectorAll("div.cell_output table")) {
    const heads = [...(table.tHead?.rows ?? [])], rows = [...(table.tBodies[0]?.rows ?? [])];
    if (!rows.length) continue;
    if (table.id.startsWith("T_")) table.classList.add("dataframe"); // one that a pandas Styler wrote looks like the others
    // the name of the index has a row of its own, otherwise empty: it joins the row above
    const last = heads.at(-1), above = heads.at(-2);
    if (last && above && last.cells.length === above.cells.length) {
      const cells = [...last.cells], filled = cells.filter((cell) => cell.textContent.trim()).length;
      if (filled && cells.every((cell, i) => !cell.textContent.trim() || (!above.cells[i].textContent.trim() && above.cells[i].colSpan === 1))) {
        cells.forEach((cell, i) => { if (cell.textContent.trim()) above.cells[i].textContent = cell.textContent; });
        last.remove();
        heads.pop();
      }
    }
    for (const row of rows) for (const cell of row.querySelectorAll("th")) if (cell.textContent.trim().length > 12) cell.classList.add("words");
    // columns counted from the right: cells that span rows are on the left
    const width = Math.min(...rows.map((row) => row.querySelectorAll("td").length));
    for (let k = 1; k <= width; k++) {
      const cells = rows.map((row) => row.cells[row.cells.length - k]);
      const texts = cells.map((cell) => cell.textContent.trim());
      const numeric = texts.some((text) => /\d/.test(text)) && texts.every((text) => number.test(text) && text.length < 32);
      const head = heads.length ? heads.at(-1).cells[heads.at(-1).cells.length - k] : undefined;
      if (numeric) for (const cell of head && head.colSpan === 1 ? [head, ...cells] : cells) cell.classList.add("number");
      else if (texts.some((text) => text.length > 24)) for (const cell of cells) cell.classList.add("words");
    }
  }
});
