// The delimiters that pymdownx.arithmatex and the docstrings write
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
};
