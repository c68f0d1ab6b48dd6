"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const stored = (key, value) => {
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch { /* a page opened from a file may have no storage: the choice then lasts as long as the page */ }
    return null;
  };

  const themeButton = document.getElementById("theme");
  const prefersDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark());
  const setTheme = (name) => {
    root.dataset.theme = name;
    themeButton.setAttribute("aria-pressed", String(name === "dark"));
  };
  const remembered = stored("safer-audit-theme");
  if (remembered === "dark" || remembered === "light") setTheme(remembered);
  themeButton.setAttribute("aria-pressed", String(isDark()));
  themeButton.addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    stored("safer-audit-theme", root.dataset.theme);
  });

  const reveal = (veil, open) => {
    veil.classList.toggle("open", open);
    const body = veil.querySelector(".veil-body");
    body.inert = !open;
    const button = veil.querySelector(".veil-button");
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Hide text" : "Show text";
  };
  const veils = all(".veil");
  const revealAll = document.getElementById("reveal-all");
  const harsh = all(".harsh > span");
  const showWords = (everywhere) => {
    for (const word of harsh) word.inert = !everywhere && !word.closest(".card")?.querySelector(".veil.open");
  };
  const showState = () => {
    const open = veils.length > 0 && veils.every((veil) => veil.classList.contains("open"));
    showWords(open);
    revealAll.setAttribute("aria-pressed", String(open));
    revealAll.textContent = open ? "Hide all texts" : "Show all texts";
  };
  for (const veil of veils) {
    reveal(veil, false);
    veil.querySelector(".veil-button").addEventListener("click", () => {
      reveal(veil, !veil.classList.contains("open"));
      if (revealAll) showState();
    });
  }
  if (revealAll) {
    revealAll.addEventListener("click", () => {
      const open = revealAll.getAttribute("aria-pressed") !== "true";
      veils.forEach((veil) => reveal(veil, open));
      showState();
    });
  }

  const tip = document.getElementById("tip");
  const showTip = (target) => {
    tip.textContent = target.dataset.tip;
    const box = target.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(above > 8 ? above : box.bottom + 8)}px)`;
    tip.classList.add("on");
  };
  const tipOf = (node) => (node instanceof Element ? node.closest("[data-tip]") ?? node.querySelector("[data-tip]") : null);
  addEventListener("pointerover", (event) => {
    const target = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (target) showTip(target); else tip.classList.remove("on");
  });
  addEventListener("focusin", (event) => {
    const target = event.target instanceof Element && event.target.closest("svg a") ? tipOf(event.target) : null;
    if (target) showTip(target); else tip.classList.remove("on");
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") tip.classList.remove("on"); });
  addEventListener("scroll", () => tip.classList.remove("on"), { passive: true });

  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "descending" ? false : head.getAttribute("aria-sort") === "ascending" || head.classList.contains("n");
        const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim().toLowerCase();
        const sign = falling ? -1 : 1;
        const rows = all("tbody tr", table).sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "" ? 1 : 0) - (y === "" ? 1 : 0);
          const numeric = Number(x) - Number(y);
          return sign * (Number.isNaN(numeric) ? x.localeCompare(y) : numeric);
        });
        table.tBodies[0].append(...rows);
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      });
    });
  }

  const filters = all("#pair-filters select");
  const matches = document.getElementById("pair-matches");
  const applyFilters = () => {
    let shown = 0;
    for (const pair of all(".pair")) {
      pair.hidden = filters.some((filter) => filter.value !== "" && pair.dataset[filter.dataset.field] !== filter.value);
      shown += pair.hidden ? 0 : 1;
    }
    const kept = document.getElementById("kept-pairs");
    if (kept && filters.some((filter) => filter.value !== "")) kept.open = true;
    matches.textContent = `${shown} shown`;
  };
  filters.forEach((filter) => filter.addEventListener("change", applyFilters));

  const openTarget = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let node = target; node; node = node.parentElement) if (node instanceof HTMLDetailsElement) node.open = true;
    target.scrollIntoView({ block: "start" });
  };
  addEventListener("hashchange", openTarget);
  openTarget();

  const links = new Map(all(".contents a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  all("main > section[id]").forEach((section) => seen.observe(section));
})();
