// Votes by keyboard, one polite live region, names for groups of choices. No key does anything while somebody types.
(() => {
  const typing = (element) =>
    element.isContentEditable || element.matches("textarea, select, [role=combobox], input:not([type=radio]):not([type=checkbox]):not([type=range])");

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || typing(event.target)) return;
    const button = [...document.querySelectorAll(`button.key-${CSS.escape(event.key.toLowerCase())}`)].find(
      (found) => !found.disabled && found.offsetParent !== null
    );
    if (button) {
      event.preventDefault();
      button.click();
    }
  });

  // The region has to be there before what it says changes: a new region is not read out.
  const watch = new MutationObserver(() => {
    const said = document.getElementById("status");
    if (said && !said.hasAttribute("aria-live")) {
      said.setAttribute("role", "status");
      said.setAttribute("aria-live", "polite");
    }
    // Gradio names groups of choices by a span that nothing refers to.
    for (const group of document.querySelectorAll("fieldset:not([aria-label])")) {
      const name = group.querySelector("[data-testid=block-info]")?.innerText;
      if (name) group.setAttribute("aria-label", name.trim());
    }
  });
  watch.observe(document.documentElement, { childList: true, subtree: true });
})();
