// A line of the last readings, drawn as SVG and coloured by the style sheet. Newest at the right.

const WIDTH = 60; // readings
const HEIGHT = 28;
const TOP = 2; // room for the stroke at the highest reading

export class Sparkline {
  /** series: lines, the first one filled. ceiling: the fixed top of the scale; null fits it to the readings. */
  constructor(svg, { series = 1, ceiling = null } = {}) {
    this.ceiling = ceiling;
    this.values = Array.from({ length: series }, () => []);
    svg.setAttribute("viewBox", `0 0 ${WIDTH - 1} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    const shape = (name) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", name);
      svg.append(path);
      return path;
    };
    this.area = shape("area");
    this.lines = this.values.map((_, index) => shape(`line line-${index}`));
  }

  /** One reading per series; null leaves a gap. */
  push(...readings) {
    this.values.forEach((values, index) => {
      values.push(readings[index] ?? null);
      if (values.length > WIDTH) values.shift();
    });
    this.#draw();
  }

  #draw() {
    const top = this.ceiling ?? Math.max(1e-9, ...this.values.flat());
    const y = (value) => (HEIGHT - ((HEIGHT - TOP) * Math.min(value, top)) / top).toFixed(2);
    this.values.forEach((values, index) => {
      const left = WIDTH - values.length;
      let path = "";
      let area = "";
      let start = null; // of the run of readings without a gap
      values.forEach((value, i) => {
        if (value === null) {
          start = null;
          return;
        }
        path += `${start === null ? "M" : "L"}${left + i} ${y(value)}`;
        area += `${start === null ? `M${left + i} ${HEIGHT}` : ""}L${left + i} ${y(value)}`;
        start ??= i;
        if (values[i + 1] == null) area += `L${left + i} ${HEIGHT}Z`;
      });
      this.lines[index].setAttribute("d", path);
      if (index === 0) this.area.setAttribute("d", area);
    });
  }
}
