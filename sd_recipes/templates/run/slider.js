// One grid of pictures at a time, chosen by the slider. Without scripts all of them are on the page.
for (const slider of document.querySelectorAll(".slider")) {
  const figures = slider.querySelectorAll("figure");
  const range = slider.querySelector("input");
  const show = () => figures.forEach((figure, number) => { figure.hidden = number !== Number(range.value); });
  slider.querySelector(".controls").hidden = figures.length < 2;
  range.addEventListener("input", show);
  show();
}
