"use strict";
// A page that is served asks now and then whether the run has gone on. What a training adds is exchanged in place; for
// anything else the page loads itself anew. Meanwhile it counts what no file tells: how long the run has taken, how long
// it should take still, and for how long nothing was written.
(() => {
  const SECONDS = 2, SILENT_SECONDS = 600;
  const meta = (page, name) => page.querySelector(`meta[name=report-${name}]`).content;
  let known = meta(document, "version"), changed = Number(meta(document, "changed"));
  const frame = meta(document, "frame");
  const live = document.getElementById("live");
  const two = (number) => String(number).padStart(2, "0");
  const duration = (seconds) => {
    const whole = Math.max(0, Math.round(seconds)), minutes = Math.round(whole / 60), hours = Math.round(whole / 3600);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
    if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
    return `${Math.floor(hours / 24)} d ${two(hours % 24)} h`;
  };
  const tick = () => {
    const now = Date.now() / 1000, silent = now - changed;
    for (const cell of document.querySelectorAll("[data-since]")) {
      cell.textContent = duration(now - Date.parse(cell.dataset.since) / 1000);
    }
    for (const cell of document.querySelectorAll("[data-until]")) {
      const left = Number(cell.dataset.until) - now;
      cell.textContent = left > 1 ? `about ${duration(left)}` : "any moment";
    }
    if ("running" in live.dataset) {
      live.textContent = `This page updates while the run continues; its files changed ${duration(silent)} ago`
        + (silent > SILENT_SECONDS ? ": it may have stopped without a message." : ".");
    }
  };
  const exchange = (page) => {
    for (const part of document.querySelectorAll("[data-live]")) {
      part.replaceWith(page.querySelector(`[data-live="${part.dataset.live}"]`));
    }
    known = meta(page, "version");
    changed = Number(meta(page, "changed"));
    tick();
  };
  let ticking = setInterval(tick, 1000);
  const ask = async () => {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== known) {
        const text = await (await fetch("/", { cache: "no-store" })).text();
        const page = new DOMParser().parseFromString(text, "text/html");
        if (meta(page, "frame") !== frame) return location.reload();
        exchange(page);
      }
      ticking = ticking || setInterval(tick, 1000);
    } catch {
      ticking = clearInterval(ticking);
      live.textContent = "The report is no longer served: this is its last state.";
    }
    return setTimeout(ask, 1000 * SECONDS);
  };
  tick();
  setTimeout(ask, 1000 * SECONDS);
})();
