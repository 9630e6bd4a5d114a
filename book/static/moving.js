/* Three things to move by hand. Each container .move[data-move] has a form, its data as JSON, and a
   picture of the first values, which a reader without scripts sees; here it is drawn again. */
"use strict";

const moving = {
  /* Eq. 8: from zero, without a correction. */
  smooth(raw, beta) {
    let average = 0;
    return raw.map((score) => (average = beta * average + (1 - beta) * score));
  },

  /* Eq. 9 in whole numbers, as BudgetSchedule: {kept(t), events, tEnd}; or {error}. */
  schedule({ init_r, target_r, total_steps, tinit, tfinal, deltaT, curve, components }) {
    if (target_r > init_r) return { error: "b(T) is above b(0): components are only taken away" };
    if (tinit + tfinal >= total_steps) return { error: "tinit + tfinal leave no step to prune in" };
    const tEnd = total_steps - tfinal;
    const P = BigInt(tEnd - tinit);
    const kept = (t) => {
      const k = BigInt(Math.min(Math.max(t - tinit, 0), tEnd - tinit));
      const share = curve === "paper" ? k ** 3n : P ** 3n - (P - k) ** 3n;
      const gone = (BigInt(components) * BigInt(init_r - target_r) * share) / (BigInt(init_r) * P ** 3n);
      return components - Number(gone);
    };
    const events = [];
    for (let t = tinit; t <= tEnd; t++)
      if ((t - tinit) % deltaT === 0 || t === tEnd) events.push(t);
    return { kept, events, tEnd };
  },
};
window.moving = moving;

/* A small plot: [x, y] points in the units of the data, as SVG in the colours of the page. */
function plot(words, xlim, ylim, xlabel, ylabel, xticks, yticks) {
  const W = plot.width, H = 260, L = 56, R = 22, T = 12, B = 44;
  const x = (v) => L + ((v - xlim[0]) / (xlim[1] - xlim[0])) * (W - L - R);
  const y = (v) => H - B - ((v - ylim[0]) / (ylim[1] - ylim[0])) * (H - T - B);
  const parts = [
    `<path class="axis" d="M${L} ${T}V${H - B}H${W - R}"/>`,
    ...xticks.map(([v, s]) => `<text x="${x(v)}" y="${H - B + 17}" text-anchor="middle">${s}</text>`),
    ...yticks.map((v) => `<text x="${L - 7}" y="${y(v) + 4}" text-anchor="end">${v}</text>`),
    `<text x="${(L + W - R) / 2}" y="${H - 6}" text-anchor="middle">${xlabel}</text>`,
    `<text x="14" y="${(T + H - B) / 2}" text-anchor="middle" transform="rotate(-90 14 ${(T + H - B) / 2})">${ylabel}</text>`,
  ];
  const self = {
    line: (points, cls) => (parts.push(`<polyline class="${cls}" points="${points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ")}"/>`), self),
    dots: (points, cls, r) => (parts.push(...points.map(([a, b]) => `<circle class="${cls}" cx="${x(a).toFixed(1)}" cy="${y(b).toFixed(1)}" r="${r}"/>`)), self),
    bar: (a, b, top, cls) => (parts.push(`<rect class="${cls}" x="${x(a).toFixed(1)}" y="${y(top).toFixed(1)}" width="${(x(b) - x(a)).toFixed(1)}" height="${(y(ylim[0]) - y(top)).toFixed(1)}"/>`), self),
    svg: () => `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${words}">${parts.join("")}</svg>`,
  };
  return self;
}

plot.width = 700;

const even = (most, count) => Array.from({ length: count + 1 }, (_, i) => (most * i) / count);
const ticks = (most, count) => even(most, count).map((v) => [v, Math.round(v)]);

const draw = {
  smoothing({ draws }, { beta, noise }) {
    const n = draws.length, jump = Math.floor(n / 3);
    const truth = draws.map((_, t) => (t < jump ? 0.2 : 0.8));
    const raw = draws.map((d, t) => truth[t] + noise * d);
    const line = moving.smooth(raw, beta);
    const half = beta > 0 ? Math.ceil(Math.log(0.5) / Math.log(beta) - 1e-9) : 1;
    const words = "Raw scores as dots, the true score dashed, the smoothed score as a line";
    const left = Math.sqrt((1 - beta) / (1 + beta));
    const points = (values) => values.map((v, t) => [t, Math.min(Math.max(v, -0.5), 1.5)]);
    return {
      svg: plot(words, [0, n - 1], [-0.5, 1.5], "step", "score", ticks(n, 4).map(([v, s]) => [Math.min(v, n - 1), s]), [-0.5, 0, 0.5, 1, 1.5])
        .dots(points(raw), "raw", 2.2).line(points(truth), "truth").line(points(line), "smoothed").svg(),
      said: `With β = ${beta} a score is forgotten by half after ${half} step${half === 1 ? "" : "s"}, and ${(100 * left).toFixed(0)} % of the noise is left. The line starts from zero.`,
    };
  },

  budget({ total_steps, matrices }, given) {
    const components = matrices * given.init_r;
    const found = moving.schedule({ ...given, total_steps, components });
    if (found.error) return { svg: null, said: `${found.error}.` };
    const { kept, events } = found;
    const every = Array.from({ length: total_steps + 1 }, (_, t) => [t, kept(t)]);
    const picture = plot("The budget over the steps, a dot at each pruning event", [0, total_steps], [0, components * 1.05], "step", "components that may stay", ticks(total_steps, 4), [0, matrices * given.target_r, components].filter((v, i, a) => a.indexOf(v) === i))
      .line(every, "smoothed").dots(events.map((t) => [t, kept(t)]), "event", events.length > 60 ? 2 : 4);
    const shown = events.length > 8 ? [...events.slice(0, 4), null, ...events.slice(-3)] : events;
    const list = shown.map((t) => (t === null ? "…" : `${t}: ${kept(t)}`)).join(", ");
    return {
      svg: picture.svg(),
      said: `${events.length} event${events.length === 1 ? "" : "s"}. What may stay after each, of ${components}: ${list}.`,
    };
  },

  ranks({ planted_ranks, runs, noises, seeds }, { score, noise }) {
    const level = noises[Number(noise)];
    const { ranks } = runs.find((run) => run.score === score && run.noise === level);
    const of = planted_ranks.map((_, i) => ranks.map((found) => found[i]));
    const mean = of.map((some) => some.reduce((a, b) => a + b, 0) / some.length);
    const picture = plot("Planted ranks as wide bars, found ranks as narrow bars with their range", [-0.6, planted_ranks.length - 0.4], [0, 12.5], "planted rank of the map", "components", planted_ranks.map((r, i) => [i, r]), [0, 4, 8, 12]);
    planted_ranks.forEach((r, i) => {
      picture.bar(i - 0.42, i + 0.42, r, "planted").bar(i - 0.2, i + 0.2, mean[i], "found");
      picture.line([[i, Math.min(...of[i])], [i, Math.max(...of[i])]], "range");
    });
    const wrong = ranks.map((found) => found.reduce((sum, r, i) => sum + Math.abs(r - planted_ranks[i]), 0) / 2);
    const misplaced = wrong.reduce((a, b) => a + b, 0) / wrong.length;
    const idle = of.filter((_, i) => planted_ranks[i] === 0).flat().reduce((a, b) => a + b, 0) / seeds.length;
    return {
      svg: picture.svg(),
      said: `${misplaced.toFixed(1)} of ${planted_ranks.reduce((a, b) => a + b, 0)} components are in the wrong map, ${idle.toFixed(1)} of them in the maps that need none (means of ${seeds.length} seeds).`,
    };
  },
};

function start(box) {
  const form = box.querySelector("form");
  const data = JSON.parse(box.querySelector("script").textContent);
  const show = () => {
    plot.width = Math.min(Math.max(box.clientWidth - 28, 300), 700); // so that words stay legible
    const given = {};
    for (const control of form.elements) {
      const number = control.type === "range";
      given[control.name] = number ? Number(control.value) : control.value;
      const output = form.querySelector(`output[data-of="${control.name}"]`);
      if (output) output.textContent = control.value;
    }
    const { svg, said } = draw[box.dataset.move](data, given);
    if (svg !== null) box.querySelector(".picture").innerHTML = svg;
    box.querySelector(".said").textContent = said;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".move").forEach(start));
