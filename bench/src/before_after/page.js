// The values under the pointer.
const tip = document.getElementById('tip');
for (const chart of document.querySelectorAll('.chart')) {
  const { left, right, seconds, unit } = chart.dataset;
  const curves = [...chart.querySelectorAll('.curve')].map(curve => ({
    name: curve.dataset.name,
    points: curve.dataset.points.split(' ').filter(Boolean).map(point => point.split(',').map(Number)),
  }));
  const cross = chart.querySelector('.cross');
  const hide = () => { tip.hidden = true; cross.setAttribute('visibility', 'hidden'); };
  chart.addEventListener('pointerleave', hide);
  chart.addEventListener('pointermove', event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    if (x < +left || x > +right) return hide();
    const at = (x - left) / (right - left) * seconds;
    const lines = curves.filter(curve => curve.points.length).map(curve => {
      const near = curve.points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
      return `${curve.name}: ${near[1].toLocaleString('en')} ${unit}`;
    });
    tip.textContent = [`${at.toFixed(1)} s`, ...lines].join('\n');
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + 'px';
    cross.setAttribute('x1', x); cross.setAttribute('x2', x); cross.setAttribute('visibility', 'visible');
  });
}
