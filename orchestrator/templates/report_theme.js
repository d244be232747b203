// Light or dark: as the system says unless the reader chose; set before anything is drawn, remembered where that works.
"use strict";
(() => {
  const THEMES = ["system", "light", "dark"];
  const KEY = "gpu-report-theme";
  const root = document.documentElement;

  function remembered() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is forbidden for files in some browsers
    }
  }

  function remember(theme) {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // then it lasts as long as the page
    }
  }

  root.dataset.theme = THEMES.includes(remembered()) ? remembered() : "system";

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => (button.textContent = `Theme: ${root.dataset.theme}`);
    button.addEventListener("click", () => {
      root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
      remember(root.dataset.theme);
      name();
    });
    button.hidden = false;
    name();
  });
})();
