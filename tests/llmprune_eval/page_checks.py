"""What holds for every page that a report writes, in a browser: wide, on a phone, on paper."""

from __future__ import annotations

# Every text that can be seen, with its contrast against what is painted behind it.
CONTRASTS = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const lum = c => { const f = c.slice(0, 3).map(v => v / 255).map(
      v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = e => { for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, words = walker.currentNode.data.trim();
    if (!words || e.tagName === 'title' || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = lum(rgb(e.closest('svg') ? style.fill : style.color)), paper = lum(rgb(
        'rgb(' + behind(e) + ')'));
    found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), words]);
  }
  return found; })()"""

# Pictures that can be seen: name, size, height of the smallest letters, words outside the picture.
PICTURES = """[...document.querySelectorAll('svg[role=img]')].filter(
  s => s.getClientRects().length).map(s => {
    const frame = s.getBoundingClientRect(), words = [...s.querySelectorAll('text')];
    const boxes = words.map(t => t.getBoundingClientRect());
    return {name: s.getAttribute('aria-label'), width: frame.width, height: frame.height,
      letters: Math.min(...words.map(t => parseFloat(getComputedStyle(t).fontSize)
        * frame.width / s.viewBox.baseVal.width)),
      outside: words.filter((t, i) => boxes[i].left < frame.left - 1 ||
        boxes[i].right > frame.right + 1 || boxes[i].top < frame.top - 1 ||
        boxes[i].bottom > frame.bottom + 1).map(t => t.textContent)}; })"""

# Width in pixels (of paper, A4 within its margins), theme, medium.
VIEWS = (
    (1200, "light", "screen"),
    (1200, "dark", "screen"),
    (390, "light", "screen"),
    (390, "dark", "screen"),
    (700, "light", "print"),
)


def check_page(browser, file):
    """Look at a page in every view; the names of the pictures of the first."""
    seen = {}
    for view in VIEWS:
        width, scheme, medium = view
        browser.open(file, width=width, scheme=scheme, medium=medium)
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.complaints() == []
        assert browser.requested() == {file.resolve().as_uri()}
        # nothing but tables that scroll by themselves is wider than the window
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, view
        pictures = browser.evaluate(PICTURES)
        assert all(p["width"] > 250 and p["height"] > 60 for p in pictures), view
        # 10 pixels on paper are 7.5 points
        least = 10 if medium == "print" else 11
        assert min(p["letters"] for p in pictures) >= least, view
        assert [p["outside"] for p in pictures if p["outside"]] == [], view
        seen[view] = [p["name"] for p in pictures]
        assert all(len(name) > 10 for name in seen[view])
        contrasts = browser.evaluate(CONTRASTS)
        assert len(contrasts) > 100
        assert [(c, words) for c, words in contrasts if c < 4.5] == [], view
    assert len({tuple(names) for names in seen.values()}) <= 2
    assert len(set(map(len, seen.values()))) == 1
    return seen[VIEWS[0]]
