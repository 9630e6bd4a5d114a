/* What the theme leaves out for who has no mouse: code that is wider than the page takes the focus, so
   that arrow keys move it; and the captions of the contents say which level of heading they are. */
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  const reach = () =>
    document.querySelectorAll("article pre, article .table-wrapper, article mjx-container").forEach((e) => {
      if (e.scrollWidth > e.clientWidth) e.tabIndex = 0;
    });
  reach();
  document.addEventListener("toggle", reach, true); // what was closed has had no width
  document.querySelectorAll(".caption[role=heading]").forEach((e) => e.setAttribute("aria-level", 2));
});
