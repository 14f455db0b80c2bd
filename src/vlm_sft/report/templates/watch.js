"use strict";
// A page that is served asks now and then whether the run has gone on, and loads itself anew when it has.
(() => {
  const SECONDS = 2;
  const known = document.querySelector("meta[name=report-version]").content;
  const live = document.getElementById("live");
  const ask = async () => {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== known) return location.reload();
      live.textContent = "This page follows the run while it goes on.";
    } catch {
      live.textContent = "The report is no longer served: this is its last state.";
    }
    return setTimeout(ask, 1000 * SECONDS);
  };
  setTimeout(ask, 1000 * SECONDS);
})();
