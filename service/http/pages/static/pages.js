"use strict";
(() => {
  const root = document.documentElement;
  const stored = (key, value) => {
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch { /* without storage the choice lasts as long as the page */ }
    return null;
  };

  const theme = document.getElementById("theme");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const show = () => theme.setAttribute("aria-pressed", String(dark()));
  const kept = stored("safer-audit-theme");
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  theme.hidden = false;
  show();
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    stored("safer-audit-theme", root.dataset.theme);
    show();
  });

  const login = document.getElementById("login");
  const enter = () => {
    if (!location.hash.startsWith("#sk-safer-")) return;
    document.getElementById("key").value = location.hash.slice(1);
    history.replaceState(null, "", location.pathname + location.search);
    login.requestSubmit();
  };
  if (login) {
    enter();
    addEventListener("hashchange", enter);
  }

  document.addEventListener("submit", (event) => {
    const question = event.target.dataset.confirm;
    if (question && !confirm(question)) event.preventDefault();
  });

  const live = document.getElementById("live");
  const busy = () => live.contains(document.activeElement) || (getSelection().type === "Range" && live.contains(getSelection().anchorNode));
  const replace = (html) => {
    const found = new DOMParser().parseFromString(html, "text/html");
    const fresh = found.getElementById("live") || found.body;
    const active = live.contains(document.activeElement) ? document.activeElement : null;
    const path = active && [active.getAttribute("href"), active.closest("form")?.getAttribute("action")];
    const top = live.querySelector(".events")?.scrollTop;
    live.replaceChildren(...fresh.childNodes);
    if (top) live.querySelector(".events").scrollTop = top;
    if (path) {
      const again = [...live.querySelectorAll("a, button")].find((node) =>
        node.getAttribute("href") === path[0] && (node.closest("form")?.getAttribute("action")) === path[1]);
      if (again) again.focus();
    }
  };

  const fetched = async (address) => {
    const answer = await fetch(address, { headers: { Accept: "text/html" } });
    if (!answer.ok || answer.redirected) throw new Error(String(answer.status));
    return answer.text();
  };

  const reload = Number(document.body.dataset.reload || 0);
  if (live && reload) {
    setInterval(async () => {
      if (document.hidden || busy()) return;
      try { replace(await fetched(location.href)); } catch { /* the next one may come through */ }
    }, reload * 1000);
  }

  const address = document.body.dataset.live;
  if (live && address) {
    let waiting = null;
    const refresh = () => {
      waiting ??= setTimeout(async () => {
        waiting = null;
        try { replace(await fetched(address)); } catch { /* the stream will tell again */ }
      }, 400);
    };
    const stream = new EventSource(document.body.dataset.events);
    for (const kind of ["job", "stage", "cancel", "progress", "note"]) stream.addEventListener(kind, refresh);
    stream.addEventListener("end", () => { stream.close(); clearTimeout(waiting); waiting = null; refresh(); });
  }

  if ("edits" in document.body.dataset) {
    const edits = [...document.querySelectorAll(".edit")];
    const keys = document.querySelector(".keys");
    if (keys) keys.hidden = false;
    const here = () => edits.findIndex((edit) => edit.contains(document.activeElement));
    const go = (place) => { if (edits[place]) { edits[place].focus(); edits[place].scrollIntoView({ block: "nearest" }); } };
    const target = location.hash && document.querySelector(location.hash.replace(/[^#\w-]/g, ""));
    if (target) target.focus();
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
      const at = here();
      if (event.key === "j") go(at + 1);
      else if (event.key === "k") go(Math.max(0, at - 1));
      else if (at < 0) return;
      else if (event.key === "t") { const texts = edits[at].querySelector(".texts"); if (texts) texts.open = !texts.open; }
      else if ("1234".includes(event.key)) edits[at].querySelectorAll(".choices button")[Number(event.key) - 1]?.click();
      else return;
      event.preventDefault();
    });
  }
})();
