// Light, dark or the system's: set before the page is painted, so that it never flashes.
"use strict";

(() => {
  const THEMES = ["system", "light", "dark"];
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem("loopsway-theme");
    } catch {
      return null; // storage is barred; the choice lasts as long as the page
    }
  }

  function set(theme) {
    root.dataset.theme = THEMES.includes(theme) ? theme : "system";
  }

  set(stored());
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => {
      button.textContent = { system: "Auto", light: "Light", dark: "Dark" }[root.dataset.theme];
      button.setAttribute("aria-label", `Colours: ${root.dataset.theme}. Change.`);
    };
    label();
    button.addEventListener("click", () => {
      set(THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length]);
      try {
        localStorage.setItem("loopsway-theme", root.dataset.theme);
      } catch {
        // as above
      }
      label();
      root.dispatchEvent(new Event("themechange"));
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      root.dispatchEvent(new Event("themechange"));
    });
  });
})();
