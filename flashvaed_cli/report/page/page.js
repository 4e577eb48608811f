// The slider and the frames of each clip. Everything else on the page works without it.
document.documentElement.classList.remove("no-script");
for (const clip of document.querySelectorAll(".clip")) {
  const data = JSON.parse(clip.querySelector("script[type='application/json']").textContent);
  const compare = clip.querySelector(".compare");
  const [under, over] = compare.querySelectorAll("img");
  const [leftTag, rightTag] = compare.querySelectorAll(".tag");
  const control = (name) => clip.querySelector(`[data-control=${name}]`);
  const source = (label, index) => `data:image/webp;base64,${data.pictures[label][index]}`;
  const show = () => {
    const index = Number(control("frame").value);
    const left = control("left").value, right = control("right").value;
    under.src = source(left, index);
    over.src = source(right, index);
    under.alt = `${left}, frame ${data.numbers[index]}`;
    over.alt = `${right}, frame ${data.numbers[index]}`;
    leftTag.textContent = left;
    rightTag.textContent = right;
    control("frame").nextElementSibling.textContent = data.numbers[index];
    control("frame").setAttribute("aria-valuetext", `frame ${data.numbers[index]}`);
  };
  const move = (percent) => {
    compare.style.setProperty("--at", `${percent}%`);
    control("slider").value = percent;
    control("slider").nextElementSibling.textContent = `${Math.round(percent)} %`;
  };
  control("slider").addEventListener("input", (event) => move(Number(event.target.value)));
  for (const name of ["frame", "left", "right"]) control(name).addEventListener("input", show);
  const drag = (event) => {
    const box = compare.getBoundingClientRect();
    move(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
  };
  compare.addEventListener("pointerdown", (event) => { compare.setPointerCapture(event.pointerId); drag(event); });
  compare.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  show();
}
