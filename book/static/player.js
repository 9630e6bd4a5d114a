/* The film as single frames: a slider, a step back, a step on, play. Without scripts: the still. */
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".film").forEach((film) => {
    const image = film.querySelector("img"), slider = film.querySelector("input");
    const play = film.querySelector("[data-do=play]");
    const words = JSON.parse(film.querySelector("script").textContent);
    const frames = words.map((_, i) => image.dataset.frames.replace("*", String(i).padStart(2, "0")));
    let timer = null;
    const show = (i) => {
      slider.value = i;
      image.src = frames[i];
      image.alt = words[i];
      slider.setAttribute("aria-valuetext", words[i]);
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    };
    const step = (by) => show(Math.min(Math.max(Number(slider.value) + by, 0), frames.length - 1));
    film.querySelector("form").hidden = false;
    film.querySelector("[data-do=back]").addEventListener("click", () => (stop(), step(-1)));
    film.querySelector("[data-do=on]").addEventListener("click", () => (stop(), step(1)));
    slider.addEventListener("input", () => (stop(), step(0)));
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(slider.value) === frames.length - 1) show(0);
      play.textContent = "Pause";
      timer = setInterval(() => {
        step(1);
        if (Number(slider.value) === frames.length - 1) stop();
      }, 500);
    });
  });
});
