r"""Golds with answers that are right and answers that are wrong, each verdict derived by hand.

`ANSWERS`: (gold, right answers, wrong answers); the tests put each answer into a `\boxed{}`.
`RESPONSES`: (gold, response, verdict in flexible mode, verdict in strict mode).
The problems behind them are invented, in the manner of the subjects of MATH (algebra, counting, geometry, intermediate
algebra, number theory, prealgebra, precalculus) and of AIME.
"""

from __future__ import annotations

# fmt: off
ANSWERS: list[tuple[str, list[str], list[str]]] = [
    ("42", [
        "42", "42.0", "+42", "042", r"42\,", "$42$", r"\text{42}", "84/2", r"\frac{84}{2}", "x=42", "n = 42",
        r"\mathbf{42}", "４２", "42.", r"\left(42\right)", "{42}", r"\,42", r"4.2\times10^1", r"4.2 \cdot 10^{1}",
        "42 units"
    ], [
        "-42", "24", "43", "4.2", "420", "42.5", r"42\pi", "42x", "(4,2)", "4,2", r"\frac{1}{42}", "", "42, 43",
        r"\{42,43\}", r"42\sqrt{2}", "42i", r"\text{forty-three}", "42 or 43", "[42,43]", "41.999999"
    ]),
    ("-7", [
        "-7", "−7", "- 7", "-7.00", "x=-7", r"\frac{-14}{2}", r"-\frac{14}{2}", r"\frac{14}{-2}", "–7", "(-7)"
    ], [
        "7", "--7", r"\pm 7", "|-7|", "-1/7"
    ]),
    ("1234567", [
        "1,234,567", "1{,}234{,}567", r"1\,234\,567", "1 234 567", r"1,\!234,\!567", "1234567.0"
    ], [
        "1,234,576", "1.234567", "123456", "1,234,567.5"
    ]),
    ("1,000", [
        "1000", "1,000", "1{,}000", "10^3", "1,000.00", r"1\,000"
    ], [
        "1", "(1,0)", "100", "10,000", "1,0,0,0"
    ]),
    (r"11,\! 111,\! 111,\! 100", [
        "11111111100", "11,111,111,100"
    ], [
        "1111111110", "11,111,111,000"
    ]),
    ("0.5", [
        "1/2", r"\frac12", ".5", "0.50", r"50\%", r"5\times10^{-1}", "½", "2^{-1}", r"\tfrac{1}{2}",
        r"0.4\overline{9}"
    ], [
        "0.05", "2", "-0.5", "5"
    ]),
    ("3.14", [
        "3.14", r"\frac{157}{50}", "3.140"
    ], [
        r"\pi", "3.1416", "3.1", r"\frac{22}{7}"
    ]),
    ("0", [
        "0", "0.0", "-0", r"\frac{0}{5}", "x=0", r"0^\circ"
    ], [
        "1", r"\emptyset", r"\text{none}", "", "10^{-30}", "00001", r"\sin(\pi n)", "n-n+1", r"\sqrt{-1}",
        "10^{-100}", r"\sin(\pi x)"
    ]),
    ("0.0001", [
        "10^{-4}", "1e-4", r"1\times 10^{-4}", r"\frac{1}{10000}", ".0001"
    ], [
        "10^{-5}", "0.001", "10^4"
    ]),
    ("2^{-98}", [
        r"\frac{1}{2^{98}}", "2^{-98}", r"\left(\frac12\right)^{98}", "4^{-49}"
    ], [
        "2^{-97}", "0", "2^{98}", r"\frac{1}{2^{97}}"
    ]),
    ("602000", [
        r"6.02\times 10^5", r"6.02 \cdot 10^{5}", "6.02e5", "602,000", "6.02×10^5"
    ], [
        r"6.02\times10^4", r"6.02\times10^{-5}"
    ]),
    (r"\frac{1}{3}", [
        "1/3", r"\dfrac{1}{3}", r"\frac13", r"\frac{2}{6}", "⅓", r"0.\overline{3}", r"0.\bar{3}", r"0.\dot{3}",
        "0.(3)", r"0.333\ldots", "3^{-1}", "x=1/3", r"\frac 1 3", "{1}/{3}", r"\tfrac13", "0.333...",
        r"0.3\overline{3}", r"0.{\overline{3}}", r".\overline{3}", r"0.\overline{33}", r"0.333\overline{3}",
        r"\color{red}\frac13", r"\textcolor{blue}{\frac{1}{3}}", r"\frac13 \text{ (since } x>0)", r"\large\frac13",
        r"\frac13\blacksquare"
    ], [
        "0.333", "0.33", "0.3333333333333333", "3", "-1/3", "1/4", "1:4", r"33\%", "0.34", r"0.3\overline{4}",
        r"0.0\overline{3}"
    ]),
    (r"\frac{14}{3}", [
        r"4\frac{2}{3}", "4 2/3", "14/3", r"\frac{28}{6}", r"4.\overline{6}", r"4+\frac23", "4⅔", r"\dfrac{14}{3}"
    ], [
        "4.67", r"\frac{3}{14}", r"4\frac13", r"4 \cdot \frac{2}{3}", "4.6666667", "42/3", r"-4\frac{2}{3}"
    ]),
    (r"-\frac{5}{12}", [
        r"\frac{-5}{12}", r"\frac{5}{-12}", "-5/12", r"-\dfrac{10}{24}", r"-0.41\overline{6}"
    ], [
        r"\frac{5}{12}", "-0.4167", r"-\frac{12}{5}", r"\frac{-5}{-12}"
    ]),
    (r"\frac{3}{56}", [
        "3/56", r"\frac3{56}", r"\frac{6}{112}"
    ], [
        r"\frac{3}{65}", r"\frac{3}{5}6", "0.05357"
    ]),
    (r"\dfrac{7}{4}", [
        "1.75", r"1\frac34", "7/4", r"1 \frac{3}{4}", "1¾"
    ], [
        "1.7", "17/4", r"\frac{4}{7}"
    ]),
    (r"\frac{1}{1+\frac{1}{2}}", [
        r"\frac23", r"\frac{2}{3}"
    ], [
        r"\frac32"
    ]),
    (r"\frac{22}{7}", [
        "22/7", r"3\frac17", r"3.\overline{142857}"
    ], [
        r"\pi", "3.14", "3.142857"
    ]),
    (r"2\sqrt{3}", [
        r"\sqrt{12}", r"2\sqrt3", "2√3", r"\frac{6}{\sqrt{3}}", r"\sqrt{3}\cdot 2", r"2 \cdot 3^{1/2}", "2*sqrt(3)",
        "sqrt(12)", r"\sqrt3+\sqrt3", r"\sqrt[4]{144}"
    ], [
        r"3\sqrt{2}", "3.46", "3.4641016", r"\sqrt{6}", r"-2\sqrt3", r"2+\sqrt3", r"2\sqrt[3]{3}", "12",
        r"\sqrt[2]{3}"
    ]),
    (r"\frac{\sqrt{3}}{3}", [
        r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt3}3", r"\sqrt{\frac13}", r"\sqrt{3}/3", "3^{-1/2}", r"\frac13\sqrt3"
    ], [
        r"\frac{\sqrt{3}}{2}", r"\sqrt{3}", "0.577", r"\frac{3}{\sqrt3}"
    ]),
    (r"\sqrt{3+2\sqrt{2}}", [
        r"1+\sqrt{2}", r"\sqrt2+1"
    ], [
        r"\sqrt2-1", r"1+2\sqrt2", "2.414", r"\sqrt{3}+\sqrt{2}"
    ]),
    (r"\sqrt{5+2\sqrt6}", [
        r"\sqrt2+\sqrt3", r"\sqrt{3}+\sqrt{2}"
    ], [
        r"\sqrt3-\sqrt2", r"\sqrt{5}", r"\sqrt5+\sqrt[4]{24}"
    ]),
    (r"\sqrt[3]{2}", [
        "2^{1/3}", r"2^{\frac13}", "∛2", r"\sqrt[6]{4}"
    ], [
        r"\sqrt{2}", r"2\sqrt[3]{}", "1.26", r"3\sqrt{2}"
    ]),
    (r"\frac{1+\sqrt5}{2}", [
        r"\frac12+\frac{\sqrt5}{2}", r"\frac{\sqrt{5}+1}{2}", r"0.5+0.5\sqrt5", r"\frac{2}{\sqrt5-1}"
    ], [
        r"\frac{1-\sqrt5}{2}", r"1+\frac{\sqrt5}{2}", "1.618", r"\frac{1+5}{2}", r"\frac{1\pm\sqrt5}{2}"
    ]),
    (r"\sqrt[3]{-8}", [
        "-2"
    ], [
        "2", r"1+\sqrt3 i"
    ]),
    (r"\sqrt{2}+\sqrt{3}+\sqrt{5}", [
        r"\sqrt5+\sqrt3+\sqrt2", r"\sqrt{10+2\sqrt6+2\sqrt{10}+2\sqrt{15}}"
    ], [
        r"\sqrt{10}", "5.382"
    ]),
    (r"\sqrt[3]{2+\sqrt{5}}+\sqrt[3]{2-\sqrt{5}}", [
        "1"
    ], [
        "0", "2"
    ]),
    (r"3\sqrt{13}", [
        r"\sqrt{117}", "3√13"
    ], [
        r"13\sqrt3", r"\sqrt{39}", r"3\sqrt{31}"
    ]),
    (r"\pi", [
        "π", "pi", r"\frac{2\pi}{2}", r"1\pi", r"\pi^1"
    ], [
        "3.14", "3.14159265358979", r"\frac{22}{7}", r"2\pi", r"\frac{\pi}{1}x",
        "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"
    ]),
    (r"25\pi", [
        "25π", r"\pi\cdot 25", r"25\pi \text{ square units}", r"5^2\pi", r"A = 25\pi"
    ], [
        "25", r"5\pi", "78.54", r"25\pi^2", r"52\pi"
    ]),
    (r"-\frac{\pi}{6}", [
        r"\frac{-\pi}{6}", r"-\pi/6", "-π/6", r"-\frac{1}{6}\pi", r"-30^\circ"
    ], [
        r"\frac{\pi}{6}", r"-\frac{6}{\pi}", r"\frac{11\pi}{6}"
    ]),
    ("e^2", [
        "e^{2}", r"e\cdot e", r"\exp(2)", r"\mathrm{e}^2"
    ], [
        "2e", "7.389", "e", "e^{-2}"
    ]),
    (r"\ln 2", [
        r"\ln(2)", r"\frac{\ln 4}{2}", r"-\ln\frac12", r"\ln{2}"
    ], [
        r"\ln 3", "0.693", r"\frac{1}{\ln 2}"
    ]),
    (r"\frac{1}{2}", [
        r"\sin 30^\circ", r"\cos 60^\circ", r"\sin\frac{\pi}{6}", r"\cos(\pi/3)", r"\log_4 2", r"\sin(30^{\circ})",
        r"\left(\frac{1}{2}\right)", r"\displaystyle\frac{1}{2}", r"{\frac{1}{2}}", r"\frac{\,1\,}{2}", r"1 \over 2",
        r"1\div 2", "1÷2", r"\frac{1}{2}\text{ (exactly)}", r"\cfrac12", r"\frac{1}{2}\;", r"\tfrac 12",
        r"\frac{1 }{ 2 }", r"=\frac12", r"x = \frac{1}{2} = 0.5", r"\frac{1}{2} = 0.5", r"\frac24=\frac12",
        r"P(A)=\frac12", r"\text{Probability} = \frac{1}{2}", r"\mathbf{\frac{1}{2}}", r"\boldsymbol{\frac12}",
        r"\text{The answer is } \frac12", r"\sin\theta=\frac12", r"\frac{1}{2}\approx 0.5", r"\frac{\sqrt{4}}{4}",
        r"\frac{5^0}{2}", "2^{-1}", r"\sqrt{\frac14}", r"\sqrt{0.25}", r"\left|-\frac12\right|",
        r"\frac{1}{2} \quad", r"\frac{{1}}{{2}}", r"{{1}\over{2}}", r"\left.\frac{1}{2}\right.",
        r"\frac{1}{2}\hspace{1cm}", r"\frac{1}{2}\,\text{.}", "\\frac{1}{2}\\\\", r"\hphantom{0}\frac12",
        r"\mbox{$\frac{1}{2}$}", r"\frac{1}{2} \text{ }", r"\dfrac{\;1\;}{\;2\;}", r"\text{$\frac{1}{2}$}",
        r"\frac{1}{2}\text{,}", r"\bf{\frac12}", r"\frac{\text{1}}{\text{2}}", r"\frac{\mathrm{1}}{2}",
        r"\frac{1}{2}~", r"&\frac12", r"\bold{\frac12}", r"\frac { 1 } { 2 }", r"\frac{1}{2}", "\\frac{1}{2}\n",
        r"\frac12{}"
    ], [
        r"\cos 30^\circ", r"\sin 60^\circ", r"\frac{1}{2}=0.6", r"\frac{1}{2}x", r"\frac{1}{2},\frac13",
        r"\frac{1}{2}\text{ or }\frac13", r"\frac{1}{20}", r"\approx 0.49", r"-\frac{-1}{-2}", r"0.49\overline{8}",
        r"\frac{1}{2}+\epsilon", r"\frac{1}{\frac{1}{2}}", r"\frac{2}{1}"
    ]),
    ("3", [
        r"\log_2 8", r"\log_{2}(8)", r"\lfloor \pi \rfloor", "|-3|", r"\binom{3}{1}", "3!/2", r"\lceil 2.1\rceil",
        r"\{3\}", "x=3", "3, 3", "x = 3.", "3=x"
    ], [
        r"\log_3 8", r"\lceil\pi\rceil", "3!", "3,4", r"\{3,5\}", "(3,3)", "x>3", r"x\ge3", "2x+1=3", "3 or 5",
        "x=3y"
    ]),
    (r"\frac{\sqrt6-\sqrt2}{4}", [
        r"\sin 15^\circ", r"\cos 75^\circ", r"\frac{\sqrt{2-\sqrt3}}{2}", r"\frac{\sqrt{6}}{4}-\frac{\sqrt2}{4}"
    ], [
        r"\frac{\sqrt6+\sqrt2}{4}", "0.2588", r"\sin 75^\circ"
    ]),
    (r"\log_2 3", [
        r"\frac{\ln 3}{\ln 2}", r"\frac{\log 3}{\log 2}", r"\log_4 9"
    ], [
        r"\log_3 2", "1.585", r"\log_2 9"
    ]),
    ("120", [
        "5!", r"\binom{10}{3}", r"\frac{6!}{6}"
    ], [
        "4!", r"\binom{10}{4}", "5"
    ]),
    ("6-5i", [
        "6 - 5i", "-5i+6", "6-5 i", "6+(-5)i", r"6-5\mathrm{i}", "z=6-5i"
    ], [
        "6+5i", "5-6i", "6-5", "6-5j+1", "(6,-5)"
    ]),
    ("-2+7i", [
        "7i-2", "-2 + 7 i"
    ], [
        "2+7i", "-2-7i", "7-2i"
    ]),
    ("i", [
        "i", r"\sqrt{-1}", "-(-i)", r"\frac{-1}{i}"
    ], [
        "-i", "1", "-1"
    ]),
    (r"\frac{1}{2}+\frac{\sqrt3}{2}i", [
        r"\frac{1+i\sqrt{3}}{2}", r"e^{i\pi/3}", r"\frac12+\frac{i\sqrt3}{2}", r"\cos 60^\circ+i\sin 60^\circ"
    ], [
        r"\frac{1-i\sqrt3}{2}", r"\frac{\sqrt3+i}{2}"
    ]),
    ("(3,-1)", [
        "(3, -1)", r"\left(3,-1\right)", "( 3 , -1 )", "(6/2,-1)", "(x,y)=(3,-1)", "x=3, y=-1",
        r"\left( 3, -1 \right)", "P(3,-1)", "（3，−1）", "P = (3,-1)", r"x=3 \text{ and } y=-1", "(3; -1)"
    ], [
        "(-1,3)", "(3,1)", "[3,-1]", r"\{3,-1\}", "3", "(3,-1,0)", "(-3,1)", "(3,-1]", "(3.1,-1)", "x=-1, y=3"
    ]),
    (r"\left( 3, \frac{\pi}{2} \right)", [
        r"(3,\pi/2)", r"(3,\frac{\pi}2)"
    ], [
        r"(\frac{\pi}{2},3)", "(3,1.57)", r"(3,\frac{\pi}{3})", "(3,90)"
    ]),
    ("(6,31,-1)", [
        "(6,31,-1)", "( 6, 31, -1 )", r"\langle 6,31,-1\rangle"
    ], [
        "(31,6,-1)", "(6,31)", "(6,31,1)", "(-1,31,6)", r"\{6,31,-1\}"
    ]),
    ("[2,5]", [
        "[2, 5]", r"\left[2,5\right]", r"2\le x\le 5", r"x \in [2,5]", r"2 \leq x \leq 5", r"5\ge x\ge2",
        r"\{x: 2\le x\le5\}", r"x\ge 2 \text{ and } x \le 5"
    ], [
        "(2,5)", "[2,5)", "(2,5]", "[5,2]", "2<x<5", "2,5", r"\{2,5\}", r"2 \le x < 5"
    ]),
    ("(3,4]", [
        "(3,4]", r"3<x\le4", r"x\in(3,4]", r"\left(3,4\right]", "3 < y <= 4"
    ], [
        "[3,4)", "(3,4)", "[3,4]", "(4,3]", r"3\le x<4"
    ]),
    (r"(-\infty,3)", [
        "x<3", r"(-\infty, 3)", "3>x", "(-∞,3)", r"\{x\mid x<3\}", r"x\in(-\infty,3)", "(-inf,3)",
        r"\{x\in\mathbb{R}: x<3\}", "2x<6"
    ], [
        r"(-\infty,3]", r"x\le3", "x>3", r"(3,\infty)", r"(-\infty,-3)", r"(\infty,3)"
    ]),
    (r"x \ge 2", [
        r"[2,\infty)", r"x\geq2", "x>=2", r"2\le x", "x ≥ 2", r"x \geqslant 2", r"[2,+\infty)"
    ], [
        "x>2", r"(2,\infty)", "x=2", r"x\le 2", "2", r"y \ge 2"
    ]),
    (r"(-\infty, 2) \cup (3, \infty)", [
        r"(3,\infty)\cup(-\infty,2)", r"x<2 \text{ or } x>3", "(-∞,2)∪(3,∞)", r"x \in (-\infty,2)\cup(3,\infty)",
        r"\mathbb{R}\setminus[2,3]", r"\{x: x<2 \text{ or } x>3\}"
    ], [
        r"(-\infty,2]\cup[3,\infty)", r"(-\infty,2)\cup(3,\infty]\cup\{2\}", "(2,3)", r"(-\infty,2)",
        r"x>2 \text{ or } x<3", r"(-\infty,2)\cap(3,\infty)"
    ]),
    (r"(-\infty,1)\cup(1,\infty)", [
        r"x\neq 1", r"\mathbb{R}\setminus\{1\}", r"x \ne 1", "x ≠ 1", r"(-\infty, 1) \cup (1, +\infty)"
    ], [
        r"\mathbb{R}", r"x\ne-1", r"(-\infty,\infty)", "x=1"
    ]),
    ("(-2,2)", [
        "|x|<2", "-2<x<2", "x^2<4"
    ], [
        r"|x|\le2", "|x|>2", "(2,-2)"
    ]),
    (r"(-\infty,\infty)", [
        r"\mathbb{R}", r"\text{all real numbers}", r"x\in\mathbb{R}"
    ], [
        r"(0,\infty)", r"\emptyset"
    ]),
    (r"[0,1)\cup(1,2]", [
        r"(1,2]\cup[0,1)", r"[0,2]\setminus\{1\}"
    ], [
        "[0,2]", r"[0,1]\cup[1,2]", r"(0,1)\cup(1,2)"
    ]),
    (r"\left[-\frac{1}{2},\sqrt{2}\right]", [
        r"[-0.5,\sqrt2]", r"-\frac12\le x\le\sqrt2"
    ], [
        r"[-\frac12,1.414]", r"(-\frac12,\sqrt2)"
    ]),
    ("1,-2", [
        "-2,1", "1, -2", "x=1,-2", r"x=1 \text{ or } x=-2", r"\{1,-2\}", r"\{-2,1\}", "x = 1, x = -2", "1 and -2",
        r"-2 \text{ and } 1", r"x\in\{1,-2\}", "1; -2", r"1\text{ or }-2", "-2 , 1"
    ], [
        "1", "-2", "1,2", "-1,2", "1,-2,0", r"\pm 1", "(-2,1)", r"\{1,2\}"
    ]),
    (r"\pm\sqrt{5}", [
        r"\sqrt5,-\sqrt5", r"-\sqrt5, \sqrt5", r"x=\pm\sqrt{5}", r"\{\sqrt5,-\sqrt5\}", "±√5",
        r"x=\sqrt5 \text{ or } x=-\sqrt5", r"\mp\sqrt5"
    ], [
        r"\sqrt5", r"-\sqrt{5}", r"\pm5", r"\pm\sqrt3", "±2.236"
    ]),
    (r"\frac{-3\pm\sqrt{5}}{2}", [
        r"\frac{-3+\sqrt5}{2},\frac{-3-\sqrt5}{2}", r"-\frac32\pm\frac{\sqrt5}{2}", r"x = \frac{-3 \pm \sqrt{5}}{2}"
    ], [
        r"\frac{3\pm\sqrt5}{2}", r"\frac{-3+\sqrt5}{2}", r"-3\pm\frac{\sqrt5}{2}"
    ]),
    (r"1\pm i", [
        "1+i,1-i", r"1 \pm i", r"\{1-i,1+i\}"
    ], [
        "1+i", r"-1\pm i", r"i\pm1"
    ]),
    (r"\{1,2,3\}", [
        "3,2,1", r"\{3,1,2\}", "1,2,3", r"\left\{1,2,3\right\}", "{1,2,3}", r"\{1,1,2,3\}", r"\lbrace 1,2,3\rbrace",
        r"\{1,2\}\cup\{3\}", r"\{ 1, 2, 3 \}", r"\left\lbrace1,2,3\right\rbrace"
    ], [
        "(1,2,3)", r"\{1,2\}", r"\{1,2,3,4\}", "123", "[1,2,3]", r"\{1,2\}\cup\{4\}"
    ]),
    ("10,11,12,13,14,-2,-1", [
        "-2,-1,10,11,12,13,14", r"\{-2,-1,10,11,12,13,14\}"
    ], [
        "10,11,12,13,14,-2", "10,11,12,13,14,2,1"
    ]),
    ("(1,2),(3,4)", [
        "(3,4),(1,2)", r"(1,2) \text{ and } (3,4)", r"\{(1,2),(3,4)\}", "(x,y)=(1,2),(3,4)"
    ], [
        "(2,1),(4,3)", "(1,2)", "(1,2),(3,5)", "(1,2,3,4)"
    ]),
    (r"\emptyset", [
        r"\varnothing", r"\text{no solution}", r"\{\}", "∅", r"\text{No solutions}", r"\text{none}",
        "no real solutions"
    ], [
        "0", r"\{0\}", r"\mathbb{R}", r"\text{infinitely many}"
    ]),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", [
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)",
        "[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\ 3&\frac{8}{2}\\ \end{pmatrix}",
        r"A=\begin{pmatrix}1&2\\3&4\end{pmatrix}"
    ], [
        r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}",
        r"\begin{pmatrix}1&2&3&4\end{pmatrix}", r"\begin{pmatrix}1\\2\\3\\4\end{pmatrix}", "-2", "(1,2,3,4)"
    ]),
    (r"\begin{pmatrix} 1/5 & -2/5 \\ 2/5 & 1/5 \end{pmatrix}", [
        r"\frac15\begin{pmatrix}1&-2\\2&1\end{pmatrix}", r"\begin{pmatrix}0.2&-0.4\\0.4&0.2\end{pmatrix}",
        r"\begin{pmatrix}\frac15&-\frac25\\\frac25&\frac15\end{pmatrix}"
    ], [
        r"\begin{pmatrix}1/5&2/5\\-2/5&1/5\end{pmatrix}", r"\begin{pmatrix}1&-2\\2&1\end{pmatrix}"
    ]),
    (r"\begin{pmatrix} -2 \\ 5 \\ 1 \end{pmatrix}", [
        r"\begin{bmatrix}-2\\5\\1\end{bmatrix}", "(-2,5,1)", r"\langle -2,5,1\rangle",
        r"\mathbf{v}=\begin{pmatrix}-2\\5\\1\end{pmatrix}", r"-\begin{pmatrix}2\\-5\\-1\end{pmatrix}"
    ], [
        r"\begin{pmatrix}5\\-2\\1\end{pmatrix}", r"\begin{pmatrix}-2\\5\end{pmatrix}",
        r"\begin{pmatrix}2\\5\\1\end{pmatrix}", r"\begin{pmatrix}-2&5&1\end{pmatrix}"
    ]),
    (r"50\%", [
        "50%", r"50 \%", "50", r"\frac12", "0.5", "50 percent", r"50\text{ percent}", r"50.0\%"
    ], [
        r"5\%", "0.05", "500", r"0.5\%", r"60\%"
    ]),
    (r"5 \text{ cm}", [
        "5", r"5\text{cm}", r"5\,\text{cm}", "5 cm", r"5\ \mathrm{cm}", "5 centimeters", r"5.0\text{ cm}",
        r"\text{5 cm}"
    ], [
        r"5\text{ m}", r"5\text{ cm}^2", r"6\text{ cm}", r"5\text{ inches}", "5 mm", r"5\text{ seconds}"
    ]),
    (r"24\text{ cm}^2", [
        "24", r"24\text{ square centimeters}", r"24\,\mathrm{cm}^2", r"24 \text{ cm}^{2}", "24 sq cm", "24 cm²"
    ], [
        r"24\text{ cm}", r"24\text{ cm}^3", r"24\text{ m}^2"
    ]),
    ("36", [
        r"\$36", r"36\text{ dollars}", r"36^\circ", r"36\text{ apples}", r"\$36.00", "36 inches", r"36\text{ ways}"
    ], [
        r"\$63", "3.6", r"\$36.50"
    ]),
    (r"\$36", [
        "36", r"\$36.00", "36 dollars", r"\text{\$36}", "$36", r"36\text{ dollars}"
    ], [
        r"36\text{ cents}", r"\$3.60", r"36\text{ euros}"
    ]),
    (r"5.4 \text{ cents}", [
        "5.4", "5.4 cents", r"\frac{27}{5}\text{ cents}"
    ], [
        "54", r"5.4\text{ dollars}"
    ]),
    (r"90^\circ", [
        "90", r"90^{\circ}", "90°", r"90\text{ degrees}", r"90 \text{ deg}", r"\angle ABC = 90^\circ",
        r"\frac{\pi}{2}"
    ], [
        r"9^\circ", r"80^\circ", r"\pi", "91°"
    ]),
    (r"12\text{ square units}", [
        "12", r"12\text{ units}^2"
    ], [
        r"12\text{ units}", r"12\text{ cubic units}"
    ]),
    (r"60\text{ miles per hour}", [
        "60", "60 mph", r"60\text{ mi/h}", r"60\text{ miles/hour}"
    ], [
        r"60\text{ km/h}", r"60\text{ miles}", "6"
    ]),
    (r"3\text{ hours}", [
        "3", "3 hours", r"3\text{ hrs}", "3 h"
    ], [
        r"3\text{ minutes}", r"3\text{ days}"
    ]),
    ("14 m", [
        r"14\text{ m}", "14 meters"
    ], [
        r"14\text{ cm}", "15 m"
    ]),
    (r"\text{Evelyn}", [
        "Evelyn", r"\text{evelyn}", r"\textbf{Evelyn}", r"\mathrm{Evelyn}", r"\text{Evelyn.}"
    ], [
        r"\text{Angela}", r"\text{Evelina}", "5", r"\text{Not Evelyn}"
    ]),
    (r"\text{June 20}", [
        "June 20", r"\text{June } 20", r"\text{June 20th}", r"20 \text{ June}", r"\text{Jun 20}"
    ], [
        r"\text{June 2}", r"\text{July 20}", "20", r"\text{June 21}"
    ]),
    (r"\text{Monday}", [
        "Monday", r"\text{monday}", r"\text{Mon}", r"\text{on Monday}", r"\text{It is Monday}"
    ], [
        r"\text{Tuesday}", r"\text{Not Monday}", r"\text{Sunday}"
    ]),
    (r"\text{odd}", [
        "odd", r"\text{Odd}", r"\text{an odd function}", r"\text{The function is odd}", r"f \text{ is odd}"
    ], [
        r"\text{even}", r"\text{neither}", r"\text{not odd}", r"\text{neither even nor odd}"
    ]),
    (r"\text{ellipse}", [
        "ellipse", r"\text{an ellipse}", r"\text{Ellipse}", r"\text{It is an ellipse}"
    ], [
        r"\text{circle}", r"\text{hyperbola}", r"\text{ellipsoid}"
    ]),
    (r"\text{(C)}", [
        "C", "(C)", r"\text{C}", r"\textbf{(C)}", r"(\text{C})", r"\text{(C) } 5", "C. 12", r"\textbf{(C)}\ 12",
        r"\text{Option C}", "C)", r"\mathrm{(C)}", "(c)"
    ], [
        "(B)", "B", r"\text{(A)}", "3", "C or D", r"\text{(D) } 5", "A, C"
    ]),
    ("A", [
        "(A)", r"\text{A}", "A", r"\text{Option A}"
    ], [
        "B", "(E)", "1"
    ]),
    (r"\text{True}", [
        "true", r"\text{True}", "True."
    ], [
        "False", r"\text{not true}"
    ]),
    (r"\text{Yes}", [
        "yes", r"\text{yes}", "YES", r"\text{Yes, it is.}", "Yes"
    ], [
        "no", "5", r"\text{No solution}", r"\text{No, it is not}"
    ]),
    (r"\text{does not exist}", [
        "DNE", r"\text{DNE}", r"\text{Does not exist}"
    ], [
        "0", r"\infty", r"\text{exists}"
    ]),
    (r"\text{infinitely many}", [
        r"\text{infinitely many solutions}", r"\text{Infinite}"
    ], [
        "0", r"\text{none}", "1"
    ]),
    (r"\text{undefined}", [
        "undefined", r"\text{Undefined}"
    ], [
        "0", r"\infty", r"\text{defined}"
    ]),
    (r"\infty", [
        "∞", "infinity", r"+\infty", r"\text{infinity}"
    ], [
        r"-\infty", "0", r"\text{DNE}", "10^{100}"
    ]),
    ("7", [
        r"\text{seven}", "seven", "7", r"\text{7}", r"\textbf{7}", r"\mathbf 7", r"7\text{ ways}", "x=7", r"\{7\}",
        "7.00", r"\frac{21}{3}", "7^{1}"
    ], [
        r"\text{eight}", r"\text{seventy}", "7, 8", "77", r"7\text{ or }8", "7^2", r"\frac{1}{7}", "7-", r"7\pm1",
        "7<8", "6.9999"
    ]),
    ("3:30", [
        "3:30", r"3:30\text{ PM}", r"\text{3:30 p.m.}"
    ], [
        "3:20", "4:30", "330"
    ]),
    (r"2:45 \text{ p.m.}", [
        "2:45", r"2:45\text{ PM}", r"\text{2:45 pm}"
    ], [
        r"2:45 \text{ a.m.}", "2:54", "3:45"
    ]),
    ("x^2+2x+1", [
        "(x+1)^2", "1+2x+x^2", "x^2 + 2x + 1", "x²+2x+1", r"x\cdot x+2\cdot x+1", "(x+1)(x+1)", "f(x)=x^2+2x+1",
        "y=(x+1)^2", r"\frac{2x^2+4x+2}{2}"
    ], [
        "x^2+2x-1", "x^2+x+1", "(x-1)^2", "x^2+1", "y^2+2y+1", "x^3+2x+1", "4", "x^2+2x+1=0"
    ]),
    ("p - q", [
        "-q+p", "p-q", "-(q-p)"
    ], [
        "q-p", "p+q", "pq"
    ]),
    ("2k+2", [
        "2(k+1)", "2 + 2k"
    ], [
        "2k+1", "2k", "2n+2"
    ]),
    ("3R^2", [
        "3R^{2}", r"3\cdot R^2"
    ], [
        "3r^3", "9R^2", "R^2"
    ]),
    ("y^4-2y^3+7y^2+y-5", [
        "7y^2-2y^3+y^4+y-5", "-5+y+7y^2-2y^3+y^4"
    ], [
        "y^4-2y^3+7y^2-y-5", "y^4+2y^3+7y^2+y-5"
    ]),
    (r"\frac{x+1}{x-1}", [
        r"\frac{-x-1}{1-x}", r"1+\frac{2}{x-1}", r"\frac{(x+1)^2}{x^2-1}", "(x+1)/(x-1)"
    ], [
        r"\frac{x-1}{x+1}", r"\frac{x+1}{1-x}", "-1", "x+1/x-1"
    ]),
    (r"\frac{3}{x^2}", [
        "3x^{-2}", "3/x^2"
    ], [
        r"\frac{3}{x}", "3x^2", r"\frac{1}{3x^2}"
    ]),
    (r"\sin 2x", [
        r"2\sin x\cos x", r"\sin(2x)", r"2\cos x \sin x"
    ], [
        r"\sin x", r"2\sin x", r"\cos 2x", r"\sin^2 x"
    ]),
    (r"\tan x", [
        r"\frac{\sin x}{\cos x}"
    ], [
        r"\frac{\cos x}{\sin x}", r"\cot x"
    ]),
    (r"\sqrt{x}", [
        "x^{1/2}", r"x^{\frac{1}{2}}"
    ], [
        "x", r"\sqrt{2x}", "x^2"
    ]),
    ("a^2b", [
        "a^2 b", r"a\cdot a\cdot b", "ba^2"
    ], [
        "ab^2", "a^2+b", "2ab"
    ]),
    ("n(n+1)/2", [
        r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", r"\binom{n+1}{2}"
    ], [
        r"\frac{n(n-1)}{2}", "n(n+1)"
    ]),
    ("x=5", [
        "5", "x = 5", "5 = x", r"x=\frac{10}{2}", "2x=10"
    ], [
        "y=5", "x=-5", "x=6", "x>5", "x=5,6"
    ]),
    ("y = 2x+3", [
        "2x+3", "y=3+2x", "y-2x=3", "2x - y + 3 = 0", "y - 3 = 2x", "f(x)=2x+3", "-2x+y=3"
    ], [
        "y=2x-3", "y=3x+2", "x=2y+3", "2x+3=0", "y=2x", "2x+y+3=0"
    ]),
    ("x+2y=6", [
        "2x+4y=12", "x=6-2y", r"y=3-\frac{x}{2}", "2y+x-6=0"
    ], [
        "x+2y=12", "2x+y=6", "x-2y=6", "6"
    ]),
    ("x^2+y^2=25", [
        "y^2+x^2=25", "x^2+y^2-25=0", r"\frac{x^2}{25}+\frac{y^2}{25}=1", "2x^2+2y^2=50"
    ], [
        "x^2+y^2=5", "x^2-y^2=25", "x+y=5", "25"
    ]),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", [
        "9x^2+4y^2=36"
    ], [
        "4x^2+9y^2=36", r"\frac{x^2}{9}+\frac{y^2}{4}=1"
    ]),
    (r"y=\frac1x", [
        "xy=1", "y = x^{-1}"
    ], [
        "y=x", r"y=-\frac1x", "xy=2"
    ]),
    ("y > 2x+1", [
        "2x+1<y", "y-2x>1", "2x - y + 1 < 0", "2y>4x+2"
    ], [
        "y<2x+1", r"y\ge 2x+1", "y>2x-1"
    ]),
    (r"f^{-1}(x)=\frac{x-3}{2}", [
        r"\frac{x-3}{2}", r"\frac{x}{2}-\frac32", "0.5x-1.5"
    ], [
        "2x+3", r"\frac{x+3}{2}", r"\frac{3-x}{2}"
    ]),
    ("52_8", [
        "52_8", "52_{8}", r"52_{\text{eight}}", "(52)_8", "42"
    ], [
        "52_9", "25_8", "52_7", "53_8"
    ]),
    ("4210_5", [
        "4210_{5}", r"4210_{\text{five}}"
    ], [
        "4210_6", "4201_5", "421_5"
    ]),
    ("1101_2", [
        "1101_{2}", r"1101_\text{two}"
    ], [
        "1011_2", "1101_3", "1101_{10}"
    ]),
    ("3:4", [
        "3:4", "3 : 4", "6:8", r"3\colon4"
    ], [
        "4:3", "3:5", "3:4:5"
    ]),
    ("1:2:3", [
        "2:4:6", "1 : 2 : 3"
    ], [
        "3:2:1", "1:2", "1:3:2"
    ]),
    (r"x \equiv 3 \pmod{5}", [
        r"3\pmod 5", r"x\equiv 3 \pmod{5}", r"x \equiv 8 \pmod 5", "3"
    ], [
        r"x\equiv 2\pmod 5", r"x\equiv3\pmod 7"
    ]),
    ("2^{1000}", [
        "4^{500}", "2^{1000}", r"2\cdot 2^{999}"
    ], [
        "2^{1001}", "2^{999}", "1000^2"
    ]),
    ("9^{9^{9^9}}", [
        "9^{9^{9^9}}", "9^{9^{9^{9}}}"
    ], [
        "9^{9^{9^8}}", "9", "9^{9^9}"
    ]),
    ("100!", [
        "100!", r"100\cdot 99!"
    ], [
        "99!", "101!"
    ]),
    ("1", [
        r"0.\overline{9}", r"0.999\ldots", "1.000", r"\sin^2 x+\cos^2 x", r"\frac{\pi}{\pi}", "e^0", "0!",
        r"\tan 45^\circ", "i^4", r"\log_{10} 10", "1"
    ], [
        "0.999", "-1", "0.9999999999999999", "e^{1}", "i", "1+10^{-1000}", r"\tanh(1000)", "1+e^{-10000}",
        "1.0000000000000001", r"\cos(10^{-10})", "(-1)^{2n}", "0.9999999999999999999999999999",
        r"\frac{10^{40}}{10^{40}+1}", r"\sqrt{1+10^{-60}}"
    ]),
    (r"\frac{3}{7}", [
        r"0.\overline{428571}", "0.428571428571..."
    ], [
        "0.428571", "0.4286"
    ]),
    (r"\frac{5}{11}", [
        r"0.\overline{45}", "0.4545...", r"0.\dot4\dot5"
    ], [
        "0.45", r"0.4\overline{5}", "0.4545"
    ]),
    (r"0.1\overline{6}", [
        r"\frac16", "1/6"
    ], [
        "0.16", "0.167", r"0.\overline{16}"
    ]),
    ("12", [
        "12", r"\text{12}", r"12 \text{ cm}", r"3\cdot4", r"12\text{ students}", r"x = 12\text{ cm}", "AB = 12",
        "AB=12", r"\text{Total: } 12", "m+n=12", "a+b+c = 12", r"12\,", "12.0", r"\mathrm{12}", "n=12", "1.2e1",
        "N = 12", r"2^2\cdot3", r"\binom{12}{1}", "|12|", "|-12|", r"\sqrt{144}", r"\lfloor 12.9\rfloor"
    ], [
        "12^2", "12x", "21", "1212", r"\sqrt{12}", "12i", "12,13", r"12\pm1", "12+", "12=13", "x+1=12", "2x=12",
        "[12,13]", "(12,12)", r"12\text{ or }13", "1 2", "-12", "12!"
    ]),
    ("-3", [
        "-3", "−3", "x=-3", r"\text{-3}", r"-\frac{6}{2}", "-3.0", r"\boxed{-3}", "- 3", r"\left(-3\right)", "(-3)"
    ], [
        "3", "+3", "|−3|", r"\pm3"
    ]),
    (r"2\sqrt{5}", [
        r"2\sqrt{5}\text{ cm}", r"\sqrt{20}", r"2 \sqrt 5", r"2\sqrt{5}\approx 4.47", r"AB = 2\sqrt5",
        r"\frac{10}{\sqrt5}", r"\sqrt{4\cdot5}", r"2\times\sqrt{5}", "2 sqrt(5)", "2sqrt5", r"2\cdot5^{\frac12}",
        r"2\cdot 5^{0.5}", r"d=2\sqrt{5}", r"\sqrt{2^2+4^2}"
    ], [
        "4.47", "4.472135955", r"5\sqrt2", r"2\sqrt{5}+1", r"\sqrt{10}", r"2\sqrt[3]{5}", "25"
    ]),
    (r"\frac{\sqrt{2}+\sqrt{6}}{4}", [
        r"\frac{\sqrt6+\sqrt2}{4}", r"\cos 15^\circ", r"\sin\frac{5\pi}{12}", r"\frac{1+\sqrt3}{2\sqrt2}",
        r"\frac{\sqrt{2+\sqrt3}}{2}"
    ], [
        r"\frac{\sqrt2-\sqrt6}{4}", "0.9659", r"\frac{\sqrt{8}}{4}"
    ]),
    (r"\sqrt{2}-1", [
        r"\frac{1}{1+\sqrt2}", r"-1+\sqrt{2}", r"\tan\frac{\pi}{8}", r"\sqrt{3-2\sqrt2}"
    ], [
        r"1-\sqrt2", "0.414", r"\sqrt{1}", r"\sqrt2+1"
    ]),
    (r"8\pi", [
        "8π", r"8\pi\text{ cm}^2", r"\pi(3^2-1)", "8*pi", r"8 \times \pi", r"\frac{16\pi}{2}", r"V=8\pi"
    ], [
        "8", "25.13", r"\pi^8", r"8+\pi", r"4\pi", r"8\pi r"
    ]),
    (r"\frac{4}{3}\pi r^3", [
        r"\frac{4\pi r^3}{3}", r"\frac43 r^3 \pi", r"V=\frac{4}{3}\pi r^3"
    ], [
        r"\frac43\pi r^2", r"4\pi r^2", r"\frac{3}{4}\pi r^3"
    ]),
    ("e^{-x}", [
        r"\frac{1}{e^x}", r"\exp(-x)", "e^{-x}"
    ], [
        "e^x", "-e^x", "e^{-2x}"
    ]),
    (r"\ln(x+1)", [
        r"\ln (1+x)", r"\log_e(x+1)", r"\ln\left(x+1\right)"
    ], [
        r"\ln x + 1", r"\ln(x-1)", r"\ln x"
    ]),
    (r"x \ln x - x + C", [
        r"x\ln x-x+C", r"-x+x\ln x+C", r"x(\ln x - 1)+C"
    ], [
        r"x\ln x+C", r"x\ln x - x^2+C"
    ]),
    (r"\cos^2 x", [
        r"1-\sin^2 x", r"\frac{1+\cos 2x}{2}", r"(\cos x)^2", r"\cos x\cos x"
    ], [
        r"\cos x^2", r"\cos 2x", r"1+\sin^2x", r"\cos x"
    ]),
    ("2^{n+1}-1", [
        r"2\cdot2^n-1", "2^{1+n}-1"
    ], [
        "2^{n}-1", "2^{n+1}", "2n+1"
    ]),
    (r"\frac{n!}{k!(n-k)!}", [
        r"\binom{n}{k}", r"{n \choose k}"
    ], [
        r"\frac{n!}{(n-k)!}", r"\binom{k}{n}"
    ]),
    ("n!", [
        "n(n-1)!", "n!"
    ], [
        "n", "(n+1)!", "n^n"
    ]),
    ("(-1)^n", [
        "(-1)^n"
    ], [
        "1", "(-1)^{n+1}", "-1"
    ]),
    ("2i", [
        "2i", "2 i", r"2\cdot i", "0+2i", "i+i", "-2/i", r"\sqrt{-4}", "i2"
    ], [
        "2", "-2i", "i^2", "2+i", "2j+1"
    ]),
    ("3+4i", [
        "4i+3", "3 + 4i", "(2+i)^2", r"\frac{25}{3-4i}", r"5e^{i\arctan(4/3)}"
    ], [
        "3-4i", "4+3i", "5", "7i", "(3,4)"
    ]),
    ("(0,0)", [
        "(0,0)", "( 0 , 0 )", "(0.0,0)", r"\text{(0,0)}"
    ], [
        "0", "(0,1)", "(1,0)", "(0,0,0)"
    ]),
    (r"\left(\frac12,-\frac34\right)", [
        "(0.5,-0.75)", "(1/2,-3/4)", r"x=\frac12,\ y=-\frac34", r"\left(\frac{1}{2}, -\frac{3}{4}\right)",
        r"\left( \dfrac{1}{2},\, -\dfrac{3}{4} \right)", r"(x, y) = \left(\frac{1}{2}, -\frac{3}{4}\right)",
        r"\left(\tfrac12 , \tfrac{-3}{4}\right)"
    ], [
        r"(\frac12,\frac34)", r"(-\frac34,\frac12)", r"(\frac12,-\frac43)", "(0.5,-0.7)", r"\{\frac12,-\frac34\}"
    ]),
    ("(2,3,5)", [
        "(2,3,5)", "x=2,y=3,z=5", "(2, 3, 5)", "(a,b,c)=(2,3,5)", r"\langle 2,3,5 \rangle"
    ], [
        "(2,5,3)", "(5,3,2)", "(2,3)", "(2,3,5,7)", r"\{2,3,5\}", "30", "235"
    ]),
    ("(1,234)", [
        "(1,234)", "(1, 234)"
    ], [
        "(1,235)", "(234,1)", "1235"
    ]),
    ("(a,b)", [
        "(a,b)"
    ], [
        "(b,a)", "ab"
    ]),
    ("(0,1)", [
        "(0,1)", "0<x<1", r"x\in(0,1)", "]0,1["
    ], [
        "[0,1]", "(0,1]", "[0,1)", "(1,0)", r"\{0,1\}", "0", r"0\le x\le1"
    ]),
    (r"[1,\infty)", [
        r"x\ge1", r"[1,+\infty)", r"[1,\infty[", r"1\le x<\infty", r"\{x|x\geq 1\}", r"y\ge1", r"x \geq 1",
        r"[1, \infty)", "[1,∞)", "[1,infinity)", r"x \in [1,\infty)", r"\left[1,\infty\right)", "[1,oo)"
    ], [
        r"(1,\infty)", "x>1", r"(-\infty,1]", r"[0,\infty)", "1", r"[-1,\infty)"
    ]),
    (r"(-\infty,-1]\cup[4,\infty)", [
        r"x\le-1\text{ or }x\ge4", r"[4,\infty)\cup(-\infty,-1]", r"x \leq -1, x \geq 4",
        r"\{x: x\le -1\}\cup\{x:x\ge4\}", r"x\in(-\infty,-1]\cup[4,+\infty)", r"\mathbb{R}\setminus(-1,4)",
        r"x \le -1 \lor x \ge 4", r"(-\infty, -1] U [4, \infty)", r"x^2-3x-4\ge0"
    ], [
        r"(-\infty,-1)\cup(4,\infty)", "[-1,4]", r"x\le -1", r"x\ge-1\text{ or }x\le4",
        r"(-\infty,-1]\cap[4,\infty)", r"(-\infty,4]\cup[-1,\infty)"
    ]),
    ("-1<x<4", [
        "(-1,4)", r"x\in(-1,4)", "4>x>-1", r"x>-1 \text{ and } x<4", r"-1 < x \text{ and } x < 4", r"\{x:-1<x<4\}",
        "-1 < x < 4.0"
    ], [
        "[-1,4]", r"-1\le x<4", "x<4", "-4<x<1", "x<-1 or x>4"
    ]),
    (r"[-5,-2]\cup\{3\}", [
        r"\{3\}\cup[-5,-2]"
    ], [
        "[-5,-2]", "[-5,3]", r"(-5,-2)\cup\{3\}", r"[-5,-2]\cup\{4\}"
    ]),
    (r"(-\infty,0)\cup(0,1)\cup(1,\infty)", [
        r"\mathbb{R}\setminus\{0,1\}", r"x\ne0,1", r"x \neq 0, x\neq 1", r"(1,\infty)\cup(0,1)\cup(-\infty,0)",
        r"x\neq 0 \text{ and } x\neq1"
    ], [
        r"(-\infty,0)\cup(1,\infty)", r"\mathbb{R}\setminus\{0\}", r"\mathbb{R}"
    ]),
    ("2,3,5", [
        "5,3,2", "2, 3, 5", r"2,\ 3,\ 5", r"2, 3, \text{ and } 5", "2, 3 and 5", r"\{2,3,5\}", "x=2,3,5",
        "x = 2, x=3, x = 5", r"x=2 \text{ or } x=3 \text{ or } x=5", r"2\text{, }3\text{, }5", "2;3;5",
        r"2, 3, \text{and } 5", r"x = 2, 3,\text{ or } 5", r"x\in\{2,3,5\}", "3, 2, 5, 2"
    ], [
        "2,3", "2,3,5,7", "2,3,6", "235", "2+3+5", "(2,3,5,5)", "30"
    ]),
    (r"0, \frac{\pi}{2}, \pi", [
        r"\pi,\pi/2,0", r"x=0,\frac{\pi}{2},\pi", r"\{0,\frac\pi2,\pi\}"
    ], [
        r"0,\pi", r"0,\frac{\pi}{3},\pi", "0,1.57,3.14", r"0^\circ,90^\circ"
    ]),
    (r"2\pm\sqrt{3}", [
        r"2+\sqrt3,2-\sqrt3", r"2-\sqrt{3},2+\sqrt{3}", r"x=2\pm\sqrt3", r"\{2\pm\sqrt3\}",
        r"2 +\sqrt 3 \text{ and } 2-\sqrt 3", r"\frac{4\pm\sqrt{12}}{2}", r"\frac{4 \pm 2\sqrt{3}}{2}",
        r"-(-2\pm\sqrt3)", r"x_{1,2}=2\pm\sqrt{3}"
    ], [
        r"2+\sqrt3", r"-2\pm\sqrt3", r"3\pm\sqrt2", r"2\pm\sqrt5", r"\pm2+\sqrt3"
    ]),
    (r"\pm 4", [
        "4,-4", "-4,4", "4, -4", r"x=\pm4", r"\{-4,4\}", r"4\text{ and }-4", "±4", "+4,-4", r"x=4\text{ or }x=-4",
        r"4 \text{ or } -4"
    ], [
        "4", "-4", r"\pm2", "16", "(4,-4)"
    ]),
    ("(1,2), (2,1)", [
        "(2,1),(1,2)", r"(1,2)\text{ and }(2,1)", r"\{(1,2),(2,1)\}", r"(x,y)\in\{(1,2),(2,1)\}",
        r"(x,y)=(1,2)\text{ or }(x,y)=(2,1)"
    ], [
        "(1,2)", "(2,1)", "1,2", "(1,2),(1,2)", "(1,1),(2,2)"
    ]),
    (r"\{a,b\}", [
        r"\{b,a\}"
    ], [
        "(a,b)", r"\{a\}"
    ]),
    ("f(x)=3x-2", [
        "3x-2", "y=3x-2", "f(x)=-2+3x", "f(x) = 3x - 2"
    ], [
        "3x+2", "f(x)=2x-3", "x=3y-2", "g(x)=3x+2"
    ]),
    ("x=2,y=3", [
        "y=3,x=2", "(2,3)", "x = 2, y = 3", r"x=2\text{ and }y=3", "(x,y)=(2,3)"
    ], [
        "x=3,y=2", "(3,2)", "x=2", "x=2,y=4"
    ]),
    ("x = -4", [
        "-4", "-4=x", "x=-4.0"
    ], [
        "y=-4", "x=4", "4"
    ]),
    (r"y=-\frac{2}{3}x+4", [
        "2x+3y=12", r"y=4-\frac{2x}{3}", "3y=-2x+12", r"-\frac23x+4", "2x+3y-12=0", r"y = \frac{-2x + 12}{3}"
    ], [
        r"y=\frac23x+4", "2x-3y=12", r"y=-\frac32x+4", r"y=-\frac{2}{3}x"
    ]),
    ("(x-2)^2+(y+3)^2=16", [
        "x^2-4x+y^2+6y-3=0", "(y+3)^2+(x-2)^2=4^2", "(x-2)^2+(y+3)^2-16=0"
    ], [
        "(x+2)^2+(y-3)^2=16", "(x-2)^2+(y+3)^2=4", "(x-2)^2-(y+3)^2=16"
    ]),
    ("2x^2-3x+1=0", [
        "4x^2-6x+2=0", "2x^2+1=3x"
    ], [
        "2x^2+3x+1=0", "2x^2-3x+1", "2x^2-3x+1=1"
    ]),
    (r"x\le 3", [
        r"(-\infty,3]", r"3\ge x", "x<=3", r"x\leqslant 3"
    ], [
        "x<3", r"x\ge3", r"(-\infty,3)", "3", "x=3"
    ]),
    (r"\frac{x^2-4}{x-2}", [
        "x+2"
    ], [
        "x-2", "x^2+2"
    ]),
    ("(x-3)(x+2)", [
        "x^2-x-6", "(x+2)(x-3)", r"(x-3)\cdot(x+2)", "-(3-x)(x+2)"
    ], [
        "(x+3)(x-2)", "x^2+x-6", "(x-3)", "x-3,x+2"
    ]),
    ("5x^3y^2", [
        "5y^2x^3", r"5x^3\cdot y^2", "5 x^{3} y^{2}"
    ], [
        "5x^2y^3", "5x^3y", "x^3y^2"
    ]),
    ("a_n=2n+1", [
        "2n+1", "a_n = 1+2n", "a_{n}=2n+1"
    ], [
        "a_n=2n-1", "2n", "b_n=2n+1"
    ]),
    (r"\frac{a}{b+c}", [
        "a/(b+c)", r"\frac{a}{c+b}", "a(b+c)^{-1}"
    ], [
        r"\frac ab+c", "a/b+c", r"\frac{a}{b}+\frac{a}{c}"
    ]),
    ("|x|", [
        r"\sqrt{x^2}", r"\left|x\right|", r"\lvert x\rvert", "|-x|"
    ], [
        "x", "-x", "x^2"
    ]),
    (r"\frac{1}{x}+\frac{1}{y}", [
        r"\frac{x+y}{xy}"
    ], [
        r"\frac{1}{x+y}", r"\frac{2}{x+y}", r"\frac{xy}{x+y}"
    ]),
    (r"\theta=\frac{\pi}{4}", [
        r"\frac{\pi}{4}", r"\theta = \pi/4", r"45^\circ"
    ], [
        r"\theta=\frac{\pi}{3}", r"x=\frac\pi3", "0.785"
    ]),
    (r"10\text{ m/s}", [
        "10", r"10\text{ meters per second}", r"10\,\mathrm{m/s}", r"10 \text{ m}/\text{s}", "10 m/s",
        r"10\text{ m s}^{-1}"
    ], [
        r"10\text{ m/s}^2", r"10\text{ km/h}", "11"
    ]),
    (r"72\text{ in}^3", [
        "72", r"72\text{ cubic inches}", r"72\text{ in}^{3}"
    ], [
        r"72\text{ in}^2", r"72\text{ ft}^3", r"72\text{ in}"
    ]),
    (r"150\text{ square feet}", [
        "150", r"150\text{ ft}^2", r"150\text{ sq ft}", "150 ft²"
    ], [
        r"150\text{ feet}", r"150\text{ square yards}", r"150\text{ cubic feet}"
    ]),
    (r"\$2.50", [
        "2.5", "2.50", r"\$2.50", r"2.50\text{ dollars}", r"\$2\frac12", "$2.50"
    ], [
        r"\$2.05", r"\$25.0", r"2.50\text{ cents}"
    ]),
    (r"25\text{ minutes}", [
        "25", "25 min", "25 minutes", r"25\,\text{mins}"
    ], [
        r"25\text{ hours}", r"25\text{ seconds}", "52"
    ]),
    (r"45^{\circ}", [
        "45", "45°", r"45^\circ", r"45\text{ degrees}", r"45\degree", r"\theta=45^\circ", "x = 45"
    ], [
        r"54^\circ", r"45\text{ cm}", r"45\text{ radians}", r"\frac{\pi}{3}"
    ]),
    (r"20^\circ\text{C}", [
        "20", r"20^\circ", r"20\,^{\circ}\mathrm{C}", "20°C", r"20 \text{ degrees Celsius}"
    ], [
        r"20^\circ\text{F}", r"-20^\circ\text{C}"
    ]),
    (r"12.5\%", [
        r"12.5\%", "12.5%", "12.5", r"12\frac12\%", r"\frac18", "0.125", r"12.50\%"
    ], [
        r"125\%", r"1.25\%", r"12\%", "8"
    ]),
    ("25", [
        r"25\%", "25%", r"25\text{ percent}", r"x=25\%", r"\text{Area}=25\text{ cm}^2", r"\text{Area} = 25",
        "[ABC]=25", r"A_{\triangle}=25", r"\text{The sum is } 25", "S_{10}=25", r"\lfloor x\rfloor = 25", "5^2=25",
        "f(5)=25", "f(2)+f(3)=25", "x^2+y^2 = 25", r"\angle ABC=25^\circ", "|z|=25", "a+b=25", r"\overline{AB}=25",
        r"\frac{a}{b}=25", r"\triangle = 25", r"25\text{ (units)}", r"25\text{ square units}", "25", r"\text{m}=25"
    ], [
        r"0.25\%", "x^2=25", "2x-1=25", r"25\text{ or }26", "25<x", r"\text{not }25", "25=26", "f(x)=25x", "25!",
        r"25^\circ+1", r"\{25,26\}"
    ]),
    (r"\text{no solution}", [
        r"\text{No Solution}", r"\emptyset", "no solutions", r"\text{None}", r"\text{There is no solution}",
        r"\text{no real solutions}", r"\text{There are no solutions.}"
    ], [
        "0", r"\text{infinitely many solutions}", r"\text{one solution}", "x=0"
    ]),
    (r"\text{Bob}", [
        r"\text{Bob}", "Bob", r"\text{bob}", r"\textit{Bob}", r"\text{The answer is Bob}"
    ], [
        r"\text{Alice}", r"\text{Bobby}", r"\text{Alice and Bob}", r"\text{Bob or Alice}"
    ]),
    (r"\text{Alice and Bob}", [
        r"\text{Alice and Bob}", r"\text{Alice} \text{ and } \text{Bob}"
    ], [
        r"\text{Alice}", r"\text{Bob}", r"\text{Alice or Carol}"
    ]),
    (r"\text{red}", [
        "red", r"\text{Red}", "RED"
    ], [
        "blue", "green", r"\text{not red}"
    ]),
    (r"\text{isosceles}", [
        r"\text{isosceles triangle}", "isosceles", r"\text{an isosceles triangle}"
    ], [
        r"\text{scalene}", r"\text{equilateral}"
    ]),
    (r"\text{neither}", [
        r"\text{Neither}", "neither"
    ], [
        "even", "odd", "both"
    ]),
    (r"\text{June 5}", [
        "June 5", r"\text{June 5th}", r"\text{5 June}", r"\text{June 5.}"
    ], [
        "June 15", "July 5", "5"
    ]),
    ("A,C", [
        "A, C", "C,A", "A and C", r"\text{A, C}", r"\text{A and C}", "A,C"
    ], [
        "A", "A,B", "C", "A,B,C"
    ]),
    ("(D)", [
        "D", r"\text{D}", r"(D)\ 24", r"\mathbf{D}", "D. 24", r"\boxed{D}", r"\textbf{(D) }24", "(D)", r"\text{(D)}",
        r"\text{Choice D}"
    ], [
        "E", "(C)", "24", "B or D"
    ]),
    ("B", [
        "B", r"\textbf{B}", "(B)", "B)", "B."
    ], [
        "A", "C", "AB", "2"
    ]),
    ("2516_8", [
        "2516_8", "2516_{8}", r"2516_{\text{eight}}", r"2516 \text{ (base 8)}", r"2516\text{ base }8", "(2516)_8",
        "1358"
    ], [
        "2516_9", "2516_{10}", "2561_8", "1358_8"
    ]),
    ("10110_2", [
        "10110_2", "22", "10110_{2}"
    ], [
        "10110_3", "1010_2", "10110_{10}"
    ]),
    (r"3.2\times10^{8}", [
        "320000000", r"3.2\cdot 10^8", "320,000,000", "3.2e8", "3.2×10⁸", r"32\times 10^7", "3.2*10^8", "3.2 x 10^8",
        r"3.2\times 10^{8}\text{ m}"
    ], [
        r"3.2\times10^7", r"3.2\times10^{-8}", "3.2", r"3.20001\times10^8", r"2.3\times 10^8"
    ]),
    ("2:5", [
        "2:5", "4:10", r"2\text{ to }5", r"\frac25", "2 : 5"
    ], [
        "5:2", "2:7", "2.5", "2,5"
    ]),
    ("1001", [
        "1,001", "1001", r"7\cdot 11\cdot 13"
    ], [
        "1011", "1,010", "101", "1000", "1002", "10001"
    ]),
    (r"\frac{2021}{2022}", [
        "2021/2022", r"1-\frac{1}{2022}"
    ], [
        r"\frac{2022}{2021}", "0.9995", r"\frac{2020}{2021}"
    ]),
    ("2^{100}", [
        "2^{100}", "4^{50}", "1267650600228229401496703205376", "1024^{10}"
    ], [
        "2^{99}", "2^{10}", r"1.2676506\times10^{30}", "1267650600228229401496703205377", "200"
    ]),
    ("10^{100}", [
        "10^{100}", "100^{50}"
    ], [
        "10^{99}", "1000", "10^{101}"
    ]),
    ("3^{3^{100}}", [
        "3^{3^{100}}"
    ], [
        "3^{3^{101}}", "27^{100}"
    ]),
    (r"\sqrt{2+\sqrt{2+\sqrt{2}}}", [
        r"2\cos\frac{\pi}{16}"
    ], [
        r"2\cos\frac{\pi}{8}", "1.96"
    ]),
    (r"\frac{\pi^2}{6}", [
        r"\pi^2/6", r"\frac16\pi^2"
    ], [
        "1.6449", r"\frac{\pi}{6}", r"\frac{\pi^2}{8}"
    ]),
    (r"\pi-3", [
        r"-3+\pi"
    ], [
        "0.14159265358979", "0.14", r"3-\pi"
    ]),
    (r"e^{\pi\sqrt{163}}", [
        r"e^{\pi\sqrt{163}}"
    ], [
        "262537412640768744", "262537412640768743.999999999999"
    ]),
    (r"\sqrt[3]{5}", [
        "5^{1/3}", r"\sqrt[3]5", r"5^{\frac{1}{3}}"
    ], [
        r"\sqrt5", r"3\sqrt5", r"\sqrt[5]{3}"
    ]),
    (r"\begin{bmatrix}0&-1\\1&0\end{bmatrix}", [
        r"\begin{pmatrix}0&-1\\1&0\end{pmatrix}", r"\left[\begin{array}{cc}0&-1\\1&0\end{array}\right]",
        r"\left[\begin{matrix}0&-1\\1&0\end{matrix}\right]", r"\begin{bmatrix} 0 & -1 \\ 1 & 0 \\ \end{bmatrix}"
    ], [
        r"\begin{bmatrix}0&1\\-1&0\end{bmatrix}", r"\begin{bmatrix}0&-1\\1&1\end{bmatrix}", "1"
    ]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [
        r"\begin{bmatrix}1\\2\end{bmatrix}", "(1,2)", r"\langle1,2\rangle", r"\begin{array}{c}1\\2\end{array}",
        r"\left(\begin{array}{c}1\\2\end{array}\right)", r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}",
        r"\left\langle1,2\right\rangle", r"\begin{pmatrix}1\cr2\end{pmatrix}",
        r"\left(\begin{matrix}1\\2\end{matrix}\right)"
    ], [
        r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", "(2,1)",
        r"\begin{pmatrix}1\\3\end{pmatrix}"
    ]),
    (r"\mathbf{i}+2\mathbf{j}", [
        r"2\mathbf{j}+\mathbf{i}"
    ], [
        r"2\mathbf{i}+\mathbf{j}"
    ]),
    (r"3\sqrt{2}\text{ cm}", [
        r"3\sqrt2", r"\sqrt{18}\text{ cm}", r"3\sqrt{2}\,\mathrm{cm}"
    ], [
        r"3\sqrt{2}\text{ m}", r"2\sqrt3\text{ cm}"
    ]),
    (r"\frac{1}{4}\text{ mile}", [
        r"\frac14", "0.25 miles", r"\frac{1}{4}\text{ mi}"
    ], [
        r"\frac14\text{ km}", r"\frac{1}{2}\text{ mile}"
    ]),
    (r"(\sqrt{2},\sqrt{3})", [
        r"(\sqrt2,\sqrt3)", "(2^{1/2},3^{1/2})"
    ], [
        "(1.414,1.732)", r"(\sqrt3,\sqrt2)"
    ]),
    ("x^3-6x^2+11x-6", [
        "(x-1)(x-2)(x-3)", "x(x^2-6x+11)-6", "(1-x)(2-x)(x-3)"
    ], [
        "(x+1)(x+2)(x+3)", "x^3-6x^2+11x+6", "x^3-6x^2-11x-6", "(1-x)(2-x)(3-x)"
    ]),
    (r"\log_3 5", [
        r"\frac{\log 5}{\log 3}", r"\frac{\ln5}{\ln3}", r"\frac{1}{\log_5 3}"
    ], [
        r"\log_5 3", "1.465", r"\log 5-\log 3"
    ]),
    (r"\frac{\ln 2}{3}", [
        r"\frac13\ln 2", r"\ln\sqrt[3]{2}", r"\ln(2)/3"
    ], [
        r"\ln\frac23", r"3\ln2", "0.231"
    ]),
    (r"\arctan\frac12", [
        r"\tan^{-1}\frac12", r"\arctan(1/2)", r"\arctan 0.5"
    ], [
        r"\arctan 2", r"\frac{1}{\tan(1/2)}", "26.57"
    ]),
    (r"\sqrt{ab}", [
        r"\sqrt a\sqrt b", r"\sqrt{a}\cdot\sqrt{b}", "(ab)^{1/2}"
    ], [
        r"\sqrt{a+b}", r"a\sqrt b", "ab"
    ]),
    ("x", [
    ], [
        r"\sqrt{x^2}", "|x|", r"\sin(\arcsin(2x))"
    ]),
    (r"\cos 2\theta", [
        r"2\cos^2\theta-1", r"1-2\sin^2\theta", r"\cos^2\theta-\sin^2\theta", r"\cos(2\theta)"
    ], [
        r"2\cos\theta", r"\cos^2\theta", r"2\cos^2\theta+1"
    ]),
    (r"\mathbb{Z}", [
        r"\text{all integers}", r"x\in\mathbb{Z}", r"\mathbb Z"
    ], [
        r"\mathbb{R}", r"\mathbb{N}", r"\text{all real numbers}"
    ]),
    ("033", [
        "33", "033"
    ], [
        "3", "330"
    ]),
    (r"\$1,234.56", [
        "1234.56", r"\$1234.56", r"1{,}234.56\text{ dollars}", "$1,234.56"
    ], [
        "1234.65", r"\$1,234", r"\$123,456"
    ]),
    (r"\text{March 15, 2020}", [
        r"\text{March 15 2020}", "March 15, 2020", r"\text{15 March 2020}"
    ], [
        r"\text{March 15, 2021}", r"\text{May 15, 2020}"
    ]),
    (r"5\text{ p.m.}", [
        r"5\text{ PM}", r"5 \text{ pm}", "5 p.m.", r"\text{5 PM}"
    ], [
        r"5\text{ a.m.}", r"6\text{ p.m.}"
    ]),
    (r"3\text{ hours }20\text{ minutes}", [
        r"\text{3 hours 20 minutes}", r"3\text{ hours } 20 \text{ minutes}"
    ], [
        r"3\text{ hours }25\text{ minutes}", r"2\text{ hours }20\text{ minutes}"
    ]),
    (r"m\angle A = 30^\circ", [
        "30", r"30^\circ", r"\angle A=30^\circ"
    ], [
        r"60^\circ", r"m\angle A=35^\circ"
    ]),
    (r"k\ge-\frac14", [
        r"k\geq -0.25", r"\left[-\frac14,\infty\right)", r"-\frac{1}{4}\le k", r"4k+1\ge0", r"4k\ge-1"
    ], [
        r"k>-\frac14", r"k\le-\frac14", r"x\ge-\frac14", r"k=-\frac14"
    ]),
    ("f'(x)=2x", [
        "2x", "f'(x)=2x"
    ], [
        "x^2", "2", "f(x)=2x^2"
    ]),
    (r"\frac{1}{2}(3+\sqrt{5})", [
        r"\frac{3+\sqrt5}{2}", r"\frac32+\frac{\sqrt5}2", r"1+\frac{1+\sqrt5}{2}",
        r"\left(\frac{1+\sqrt5}{2}\right)^2"
    ], [
        r"\frac{3-\sqrt5}{2}", r"\frac{3+5}{2}", "2.618"
    ]),
    ("(2)(3)", [
        "6"
    ], [
        "23", "(2,3)"
    ]),
    ("4", [
        "2+2=4", r"\frac{8}{2}=4", "4", "2^2=4", "4=4", r"x=\frac{8}{2}=4"
    ], [
        "2+2=5", "2+3=4", "4=5"
    ]),
    (r"\frac{3}{4}\text{ or }0.75", [
        "0.75"
    ], [
        "0.7"
    ]),
    ("3/4", [
        r"\frac34\text{ or }0.75", r"75\%", r"\frac34=0.75=75\%"
    ], [
        r"\frac34\text{ or }0.74", r"7.5\%"
    ]),
    (r"\left(\frac{1}{2}, \infty\right)", [
        r"x>\frac12", r"(0.5,\infty)", "x > 0.5", "(1/2,∞)"
    ], [
        r"[\frac12,\infty)", r"x<\frac12", r"(\frac12,2)"
    ]),
    (r"\left\{-3,\frac{1}{2}\right\}", [
        r"-3,\frac12", r"x=-3,\frac12", r"\left\{\frac12,-3\right\}", r"x = \frac{1}{2}\ \text{or}\ x = -3",
        r"x\in\left\{-3,\tfrac12\right\}", r"\{-3, 0.5\}"
    ], [
        r"3,-\frac12", r"(-3,\frac12)", "-3"
    ]),
    ("x^2 - 5x + 6 = 0", [
        "(x-2)(x-3)=0", "x^2+6=5x", "2x^2-10x+12=0"
    ], [
        "x^2+5x+6=0", "x^2-5x+6", "x^2-6x+5=0"
    ]),
    (r"\frac{x^2}{2}+C", [
        r"\frac12x^2+C", "0.5x^2+C"
    ], [
        "x^2+C", r"\frac{x^3}{2}+C"
    ]),
    ("y=x^2", [
        "x^2=y", "x^2", "f(x)=x^2", "y-x^2=0"
    ], [
        "x=y^2", "y=x^3", "y=2x", "y=-x^2", "x^2=-y"
    ]),
    (r"x=\pm 3", [
        "3,-3", r"x=3\text{ or }x=-3", r"\pm3", "x = -3, 3", r"\{-3, 3\}"
    ], [
        "x=3", "x=-3", "9", r"x=\pm9"
    ]),
    ("1:3", [
        "1:3", r"\frac13", r"1\text{ to }3", "2:6", r"\frac{1}{3}:1"
    ], [
        "3:1", "1:4", "1,3"
    ]),
    (r"\frac{7}{12}", [
        r"\frac{7}{12}", r"\frac{1}{3}+\frac14", "7/12", r"0.58\overline{3}", r"\frac{14}{24}", r"\frac{3.5}{6}",
        r"\frac{-7}{-12}"
    ], [
        "0.583", "0.5833", r"\frac{12}{7}", r"\frac{7}{13}", "7:13", r"\frac{7}{1}2"
    ]),
    (r"-\frac{3}{2}", [
        "-1.5", r"-1\frac12", r"\frac{-3}{2}", r"-\frac32", "−3/2", "-3/2", "-1 1/2"
    ], [
        "1.5", r"-1+\frac12", r"-\frac23", r"\frac32"
    ]),
    ("6!", [
        "720", r"6\cdot5\cdot4\cdot3\cdot2\cdot1"
    ], [
        "120", "7!"
    ]),
    (r"\binom{8}{3}", [
        "56", r"\binom85", r"\frac{8!}{3!5!}", r"{8\choose3}"
    ], [
        r"\binom84", "336", r"\frac{8}{3}"
    ]),
    (r"5\sqrt{2} + 3\sqrt{3}", [
        r"3\sqrt3+5\sqrt2", r"\sqrt{50}+\sqrt{27}"
    ], [
        r"5\sqrt3+3\sqrt2", r"8\sqrt5", "12.267", r"5\sqrt2-3\sqrt3"
    ]),
    ("a=1, b=2", [
        "b=2, a=1", "(1,2)", r"a=1\text{ and }b=2", "(a,b)=(1,2)"
    ], [
        "a=2,b=1", "a=1"
    ]),
    ("5,6", [
        "5, 6", r"5 \text{ and } 6", "6,5"
    ], [
        "5", "56"
    ]),
    ("10^{-3}", [
        "0.001", r"\frac{1}{1000}", "1e-3", r"1\times10^{-3}", "10^{−3}", "10⁻³"
    ], [
        "10^{3}", "0.01", "-1000", "10^-4", "-10^3"
    ]),
    ("32_{5}", [
        "32_5", "17", r"32_{\text{five}}"
    ], [
        "32_6", "23_5", "32_{10}", "33_5"
    ]),
    (r"\text{2 hours}", [
        "2", r"2\text{ hours}", "2 hr"
    ], [
        r"2\text{ minutes}", "3"
    ]),
    (r"100\pi \text{ cm}^2", [
        r"100\pi", r"100\pi\,\text{cm}^2", r"100 \pi \mathrm{~cm}^2", r"100\pi\text{ square cm}"
    ], [
        r"100\pi\text{ cm}", "100", "314.16", r"10\pi\text{ cm}^2"
    ]),
    (r"30^{\circ}", [
        r"30^{\circ}", "30", r"30^\circ", "30 degrees", r"\frac{\pi}{6}", r"\angle B = 30^\circ", r"\theta = 30"
    ], [
        "60", r"\frac{\pi}{3}", r"30\text{ rad}", r"-30^\circ"
    ]),
    (r"\left(\frac{1}{2}\right)^{10}", [
        r"\frac{1}{1024}", "2^{-10}", "0.5^{10}", "0.0009765625"
    ], [
        "0.000977", r"\frac{1}{512}", r"\frac{1}{20}"
    ]),
    (r"\cot x", [
        r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan x}", r"\cot x"
    ], [
        r"\tan x", r"\frac{\sin x}{\cos x}"
    ]),
    (r"\sqrt{x^2+1}", [
        "(x^2+1)^{1/2}", r"\sqrt{1+x^2}"
    ], [
        "x+1", r"\sqrt{x^2}+1", r"\sqrt{x^2-1}", r"\sqrt{x+1}"
    ]),
    (r"\frac{2x}{(x+1)^2}", [
        r"\frac{2x}{x^2+2x+1}", "2x(x+1)^{-2}", r"\frac{2}{x+1}-\frac{2}{(x+1)^2}"
    ], [
        r"\frac{2x}{x+1}", r"\frac{2x}{x^2+1}", r"\frac{2}{(x+1)^2}"
    ]),
    ("3x+4y-12=0", [
        "3x+4y=12", r"y=-\frac34x+3", "6x+8y-24=0", "-3x-4y+12=0", r"\frac x4+\frac y3=1"
    ], [
        "3x-4y-12=0", "4x+3y-12=0", "3x+4y+12=0", "3x+4y-12"
    ]),
    ("x^2/9 - y^2/16 = 1", [
        r"\frac{x^2}{9}-\frac{y^2}{16}=1", "16x^2-9y^2=144"
    ], [
        r"\frac{y^2}{9}-\frac{x^2}{16}=1", "16x^2+9y^2=144", "9x^2-16y^2=144"
    ]),
    (r"-\infty", [
        r"-\infty", "-∞"
    ], [
        r"\infty"
    ]),
    (r"\text{Both}", [
        "both"
    ], [
        "neither"
    ]),
    (r"4\text{ and }-4", [
        r"\pm4", "4,-4"
    ], [
        "4"
    ]),
    ("p=3,q=5", [
        "q=5,p=3", r"p = 3 \text{ and } q = 5"
    ], [
        "p=5,q=3"
    ]),
    ("2025", [
        "2025", "2,025", "45^2", "2025.0"
    ], [
        "2,052", "20.25", "2024", "2025.5"
    ]),
    ("7.5", [
        r"7\frac12", r"\frac{15}{2}", "7.50", "7½", r"7.5\text{ hours}"
    ], [
        "75", "7.05", "7", "8", r"7\frac{1}{5}"
    ]),
    (r"\frac{\pi}{4}-\frac{1}{2}", [
        r"\frac{\pi-2}{4}", r"\frac14(\pi-2)", r"-\frac12+\frac\pi4"
    ], [
        r"\frac{\pi-1}{4}", r"\frac{\pi+2}{4}", "0.285", r"\frac{2-\pi}{4}"
    ]),
    (r"x\in(-2,3]", [
        "(-2,3]", r"-2<x\le3", r"-2<x\leq 3"
    ], [
        "[-2,3)", r"-2\le x<3", "-2<x<3", "(-3,2]"
    ]),
    (r"\{x \mid x \ne 2\}", [
        r"x\ne2", r"\mathbb{R}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)", r"\text{all real numbers except }2"
    ], [
        "x=2", r"\mathbb{R}", r"x\ne-2"
    ]),
    (r"\text{all real numbers except } 2", [
        r"x\neq 2", r"(-\infty,2)\cup(2,\infty)"
    ], [
        r"x\neq 3", r"\mathbb{R}"
    ]),
    ("AB", [
        "AB", "BA", r"A\cdot B"
    ], [
        "A+B", "A"
    ]),
    (r"\overrightarrow{AB}", [
        r"\overrightarrow{AB}", r"\vec{AB}"
    ], [
        r"\overrightarrow{BA}"
    ]),
    (r"\triangle ABC", [
        r"\triangle ABC"
    ], [
        r"\triangle ABD", "5"
    ]),
    ("e", [
        "e", r"\mathrm{e}", "e^1", r"\exp(1)", r"\exp 1"
    ], [
        "2.718281828459045", "2.718", r"\frac{1}{e}", "e^2"
    ]),
    (r"2\ln 3", [
        r"\ln 9", r"2 \ln(3)", r"\ln 3^2", r"\ln{9}"
    ], [
        r"\ln 6", "2.197", r"(\ln3)^2", r"\log_2 3"
    ]),
    (r"\log 2", [
        r"\log_{10}2", r"\log(2)", r"\log 2"
    ], [
        r"\log 3", "0.301"
    ]),
    ("1+2i,1-2i", [
        r"1\pm2i", "1-2i,1+2i", r"\{1+2i,1-2i\}", r"x=1\pm2i"
    ], [
        "1+2i", r"-1\pm2i", r"2\pm i"
    ]),
    (r"\begin{pmatrix} x \\ y \end{pmatrix} = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", [
        r"\begin{pmatrix}1\\2\end{pmatrix}"
    ], [
        r"\begin{pmatrix}2\\1\end{pmatrix}"
    ]),
    (r"2\begin{pmatrix}1&0\\0&1\end{pmatrix}", [
        r"\begin{pmatrix}2&0\\0&2\end{pmatrix}"
    ], [
        r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"
    ]),
    ("[1,2,3]", [
        "[1,2,3]", "[1, 2, 3]"
    ], [
        "[3,2,1]", "[1,2]", "[1,2,4]"
    ]),
    ("-x", [
        "-x", r"-1\cdot x", "0-x"
    ], [
        "x", "|x|", "x^{-1}"
    ]),
    ("2^{x}", [
        "2^x", r"e^{x\ln2}", r"\frac{1}{2^{-x}}"
    ], [
        "x^2", "2x", "2^{-x}"
    ]),
    ("x^{y+1}", [
        r"x\cdot x^y", "x^{1+y}"
    ], [
        "x^y+1", "x^{y-1}"
    ]),
    ("xyz", [
        "zyx", r"x\cdot y\cdot z", "x y z"
    ], [
        "x+y+z", "xy"
    ]),
    (r"\sqrt{2}\text{ and }-\sqrt{2}", [
        r"\pm\sqrt2"
    ], [
        r"\sqrt2"
    ]),
    (r"(1+\sqrt{2})^3", [
        r"7+5\sqrt2"
    ], [
        r"7-5\sqrt2", r"1+2\sqrt2", "14.07"
    ]),
    (r"\frac{1}{\sqrt{2}+\sqrt{3}}", [
        r"\sqrt3-\sqrt2"
    ], [
        r"\sqrt2-\sqrt3", r"\frac{1}{\sqrt5}"
    ]),
    ("99^{99}", [
        "99^{99}", r"9^{99}\cdot 11^{99}"
    ], [
        "99^{98}", r"99\cdot99"
    ]),
    ("2023^{2023}", [
        r"2023\cdot2023^{2022}"
    ], [
        "2023^{2022}"
    ]),
    (r"\frac{4}{33}", [
        r"0.\overline{12}", "0.(12)", r"0.12\overline{12}", "0.121212..."
    ], [
        r"0.1\overline{2}", "0.12"
    ]),
    ("2", [
        r"1.\overline{9}", r"\log 100", r"\log_{10}100", "|-2|", r"\sqrt4", r"\min(2,3)", r"\max\{1,2\}",
        r"\gcd(4,6)", "2.", "+2", r"e^{\ln2}", "2"
    ], [
        "-2", r"\min(1,2)", r"\log 10", "2+2^{-100000}", r"2\cos(10^{-2000})"
    ]),
    (r"2\frac{1}{3}", [
        r"2\ \frac13", r"2 \frac{1}{3}", "2 1/3", r"\frac73", r"2\,\frac{1}{3}", r"2\tfrac13", r"2.\overline3"
    ], [
        "2/3", r"2\cdot\frac13", "2.33", r"\frac{21}{3}"
    ]),
    (r"(1,3)\cup(3,5)", [
        r"(1,5)\setminus\{3\}", r"1<x<5, x\ne3", r"1<x<3\text{ or }3<x<5", r"1<x<5\text{ and }x\neq3",
        r"(3,5)\cup(1,3)", r"(1,5) \backslash \{3\}"
    ], [
        "(1,5)", r"(1,3]\cup[3,5)", r"(1,3)\cup(4,5)"
    ]),
    (r"x\neq3", [
        r"\mathbb{R}\setminus\{3\}", r"\mathbb{R} - \{3\}", r"\mathbb{R}\backslash\{3\}",
        r"(-\infty,3)\cup(3,\infty)", r"\{x\in\mathbb{R}\mid x\neq3\}", r"x\in\mathbb{R}, x\neq 3",
        r"x\in\mathbb{R}\setminus\{3\}", r"\R\setminus\{3\}"
    ], [
        "x=3", r"\mathbb{R}", r"x\neq-3"
    ]),
    (r"y=\frac{6}{x}", [
        "xy=6", "y=6/x", r"x=\frac6y"
    ], [
        "xy=5", "y=6x", r"\frac{x}{y}=6"
    ]),
    ("x=3", [
        "x-3=0", "3", "x=3"
    ], [
        "x+3=0", "y=3", "x-3"
    ]),
    ("y=2x+1, y=-x", [
        "y=-x, y=2x+1", r"y=2x+1\text{ and }y=-x", "y-2x=1, y=-x"
    ], [
        "y=2x+1", "y=2x-1,y=-x"
    ]),
    ("y-1=2(x-3)", [
        "y=2x-5", "2x-y=5", "y=2(x-3)+1"
    ], [
        "y=2x+5", "y=2x-7"
    ]),
    (r"\frac{x}{3}+\frac{y}{2}=1", [
        "2x+3y=6", r"y=2-\frac{2x}{3}"
    ], [
        "3x+2y=6", "2x+3y=1"
    ]),
    (r"2x+3y\le 6", [
        r"y\le2-\frac{2x}{3}", r"6\ge2x+3y", r"4x+6y\leq12"
    ], [
        "2x+3y<6", r"2x+3y\ge6", r"y\ge2-\frac{2x}{3}"
    ]),
    (r"y=\sqrt{x}", [
        r"\sqrt{x}", "y=x^{1/2}"
    ], [
        "y^2=x", "x=y^2", r"y=-\sqrt x", r"y=\sqrt{2x}"
    ]),
    ("x=y", [
        "y=x", "x-y=0"
    ], [
        "x=-y", "x=2y"
    ]),
    (r"\text{Quadrant II}", [
        "II", r"\text{quadrant II}", r"\text{II}"
    ], [
        "III", "I", r"\text{Quadrant IV}"
    ]),
    (r"5\text{ m/s}", [
        r"5\,\frac{\text{m}}{\text{s}}", r"5 \frac{\mathrm{m}}{\mathrm{s}}", "5 m/s", r"5\text{ m/s}"
    ], [
        r"5\frac{\text{km}}{\text{h}}"
    ]),
    (r"\$5", [
        r"5\$", r"5\text{ dollars}", r"\$5.00", r"5~\text{USD}", r"\$\,5"
    ], [
        r"\$50", r"5\text{ cents}", "€5"
    ]),
    (r"2\pi k, k\in\mathbb{Z}", [
        r"2\pi k", r"2k\pi,\ k \in \mathbb{Z}", r"2\pi k \text{ where } k\in\mathbb{Z}", r"x=2\pi k"
    ], [
        r"\pi k", r"2\pi", r"2\pi k+\pi, k\in\mathbb Z"
    ]),
    ("x^2", [
        r"x^2 \text{ for all } x", r"f(x)=x^2\text{, where } x>0", r"x\cdot x"
    ], [
        "x^3", "2x"
    ]),
    ("10^{20}", [
        "100000000000000000000", r"\sqrt{10^{40}}"
    ], [
        r"\sqrt{10^{40}+1}", "10^{20}+1", "99999999999999999999"
    ]),
    ("0.3", [
        "0.3", r"\frac{3}{10}", "0.1+0.2", ".30"
    ], [
        "0.30000000000000004", "0.33", "0.03"
    ]),
    (r"\frac{\pi}{2}", [
        r"\arcsin 1", r"90^\circ", r"\arccos 0"
    ], [
        r"\arctan(10^{400})", r"\arctan(10^{50})", "1.5707963267948966", r"\arctan(10^{4000})",
        r"\frac{\pi}{2}+10^{-5000}"
    ]),
    ("9007199254740993", [
        "9007199254740993", "2^{53}+1"
    ], [
        "9007199254740992", "2^{53}", "9007199254740994"
    ]),
    (r"\sqrt{2}", [
        "2^{0.5}", "2^{1/2}", r"\frac{2}{\sqrt2}", r"\sqrt{\sqrt{4}}"
    ], [
        "1.41421356237309504880168872420969807856967187537694", r"\frac{99}{70}", r"\sqrt{2.0000000001}",
        r"\frac{665857}{470832}"
    ]),
    (r"\binom{n}{2}", [
        r"\frac{n(n-1)}{2}", r"\frac{n^2-n}{2}"
    ], [
        r"\frac{n(n+1)}{2}", r"\frac{n}{2}"
    ]),
    (r"\cos(\pi n)", [
        r"\cos(n\pi)"
    ], [
        "(-1)^n"
    ]),
    (r"\frac{1}{i}", [
        "-i"
    ], [
        "i", "1"
    ]),
    (r"\operatorname{cis} 60^\circ", [
        r"\frac12+\frac{\sqrt3}2i", r"e^{i\pi/3}"
    ], [
        r"\frac12-\frac{\sqrt3}2i"
    ]),
    ("A(1,2), B(3,4)", [
        "(1,2),(3,4)", r"A(1,2)\text{ and }B(3,4)"
    ], [
        "(1,2)", "(2,1),(4,3)"
    ]),
    (r"\frac{9\sqrt{3}}{4}\text{ cm}^2", [
        r"\dfrac{9\sqrt3}{4}\text{ cm}^2", r"\frac{9}{4}\sqrt3", r"2.25\sqrt3\text{ cm}^2",
        r"\frac{9\sqrt{3}}{4} cm^2"
    ], [
        r"\frac{9\sqrt3}{4}\text{ cm}", r"\frac{9\sqrt2}{4}", "3.897"
    ]),
    (r"\frac{3-\sqrt{5}}{2}", [
        r"1.5-\frac{\sqrt5}{2}", r"\frac{2}{3+\sqrt5}", "(3-√5)/2", r"\frac{6-2\sqrt5}{4}",
        r"\left(\frac{\sqrt5-1}{2}\right)^2"
    ], [
        r"\frac{3+\sqrt5}{2}", r"3-\frac{\sqrt5}{2}", "0.381966"
    ]),
    (r"(-3,2)\cup(2,\infty)", [
        r"x>-3, x\ne2", r"x>-3\text{ and }x\neq2", r"x\in(-3,2)\cup(2,\infty)", r"(-3,\infty)\setminus\{2\}"
    ], [
        r"(-3,\infty)", r"[-3,2)\cup(2,\infty)", "x>-3"
    ]),
    (r"\text{6 inches}", [
        "6", "6 in", r"6\text{ in.}", "6 inches"
    ], [
        "6 ft", "7"
    ]),
    ("17", [
        "17", r"17\pmod{20}", r"x\equiv17\pmod{20}"
    ], [
        r"17\pmod{20}+1"
    ]),
    ("-2x+3", [
        "3-2x", "-(2x-3)"
    ], [
        "2x+3", "-2x-3", "3+2x"
    ]),
    (r"a+b\sqrt{2}", [
        r"b\sqrt2+a"
    ], [
        r"a\sqrt2+b", r"a-b\sqrt2"
    ]),
    (r"\sqrt{3}i", [
        r"i\sqrt3", r"\sqrt{-3}", r"\sqrt{3}\,i"
    ], [
        r"\sqrt{3i}", r"-\sqrt3i", r"\sqrt3"
    ]),
    ("(x+2)(x-2)", [
        "x^2-4", "(x-2)(x+2)", "x^2 - 2^2"
    ], [
        "x^2+4", "(x-2)^2", "x-2,x+2"
    ]),
    ("4:3:2", [
        "8:6:4", "4 : 3 : 2"
    ], [
        "2:3:4", "4:3"
    ]),
    ("[1,3)", [
        "[1,3)", r"1\le x<3", "[1,3[", r"\{x:1\le x<3\}", r"1 \leq x \text{ and } x < 3"
    ], [
        "(1,3]", "[1,3]", "(1,3)"
    ]),
    ("12:30", [
        "12:30", "12:30 PM"
    ], [
        "12:03"
    ]),
    ("n=7", [
        "7", "n=7"
    ], [
        "m=7", "n=-7"
    ]),
    ("7th", [
        "7th", r"7^{\text{th}}"
    ], [
        "8th"
    ]),
    ("10^{10^{10}}", [
        "10^{10^{10}}"
    ], [
        "10^{10^{10}}+1", "10^{10^{9}}", "10^{10^{11}}", "10"
    ]),
    (r"\frac{5}{8}", [
        "0.625", "5/8", r"62.5\%", r"\frac{10}{16}"
    ], [
        "0.62", r"\frac58x", "8/5", "58"
    ]),
    ("1.5", [
        r"\frac32", "1.50", r"1\frac{1}{2}", r"150\%"
    ], [
        "15", r"1\frac15", "1,5"
    ]),
    (r"3.\overline{6}", [
        r"\frac{11}{3}", r"3\frac23", "3.666..."
    ], [
        "3.67", "3.6"
    ]),
    ("1{,}234{,}567", [
        "1234567", "1,234,567"
    ], [
        "1,234,568"
    ]),
    (r"\text{7:45 AM}", [
        "7:45", r"7:45\text{ a.m.}", "7:45 am"
    ], [
        "7:45 PM", "7:54 AM"
    ]),
    (r"\text{thirty-five}", [
        "35", r"\text{thirty-five}", "thirty five"
    ], [
        "53", "30"
    ]),
    (r"2^{3} \cdot 3^{2}", [
        "72", r"2^3\cdot3^2", r"3^2\times 2^3"
    ], [
        "36", r"2^2\cdot3^3"
    ]),
    ("$12.50", [
        "12.5", r"\$12.50", "12.50 dollars"
    ], [
        "12.05", "125"
    ]),
    (r"-\sqrt{2}", [
        r"-\sqrt2", "-2^{1/2}", r"\frac{-2}{\sqrt2}"
    ], [
        r"\sqrt2", r"\sqrt{-2}", "-1.414"
    ]),
    (r"36+9\pi", [
        r"9\pi+36", r"9(\pi+4)", r"9(4+\pi)\text{ cm}^2"
    ], [
        r"45\pi", r"36-9\pi", "64.27", r"9+36\pi"
    ]),
    (r"\angle ABC", [
        r"\angle ABC"
    ], [
        r"\angle BAC"
    ]),
    (r"16\sqrt{3}\text{ square units}", [
        r"16\sqrt3", r"16 \sqrt{3}\text{ units}^2"
    ], [
        r"16\sqrt3\text{ units}", r"16\sqrt2"
    ]),
    (r"120^\circ", [
        r"\frac{2\pi}{3}", "120"
    ], [
        r"60^\circ", r"\frac{\pi}{3}"
    ]),
    (r"\text{30-60-90}", [
        r"\text{30-60-90}", "30-60-90"
    ], [
        "45-45-90"
    ]),
    ("1,1,2,3,5", [
        "1, 1, 2, 3, 5"
    ], [
        "1,2,3,5,8", "1,1,2,3"
    ]),
    (r"\begin{pmatrix} 3 & -1 \\ 0 & 2 \end{pmatrix}", [
        r"\begin{pmatrix} 3 & -1 \\ 0 & 2 \end{pmatrix}", r"\begin{bmatrix} 3 & -1 \\ 0 & 2 \end{bmatrix}"
    ], [
        r"\begin{pmatrix} -1 & 3 \\ 0 & 2 \end{pmatrix}", r"\begin{pmatrix} 3 & 0 \\ -1 & 2 \end{pmatrix}",
        r"\begin{pmatrix} 3 & -1 \\ 0 & 2 \\ 0 & 0\end{pmatrix}"
    ]),
    (r"r=2\cos\theta", [
        r"2\cos\theta", r"r = 2 \cos \theta"
    ], [
        r"r=2\sin\theta", r"r=\cos\theta"
    ]),
    (r"\left(2,\frac{5\pi}{3}\right)", [
        r"(2,5\pi/3)", r"\left( 2, \frac{5\pi}{3} \right)", r"(r,\theta)=(2,\frac{5\pi}{3})"
    ], [
        r"(2,\frac{\pi}{3})", r"(-2,\frac{5\pi}{3})"
    ]),
    (r"\frac{\sqrt{6}+\sqrt{2}}{4}", [
        r"\sin 75^\circ", r"\frac{\sqrt2(\sqrt3+1)}{4}"
    ], [
        r"\frac{\sqrt6-\sqrt2}{4}"
    ]),
    ("[-1,1]", [
        r"-1\le x\le 1", "[-1, 1]", r"|x|\le1", r"y\in[-1,1]"
    ], [
        "(-1,1)", r"\{-1,1\}"
    ]),
    (r"x = \frac{\pi}{4} + \pi k", [
        r"\frac{\pi}{4}+k\pi", r"x=\frac{\pi}{4}+\pi k, k\in\mathbb{Z}", r"\frac{\pi(1+4k)}{4}"
    ], [
        r"\frac\pi4+2\pi k", r"\frac{\pi}{4}"
    ]),
    ("1,2,4,8", [
        "8,4,2,1", r"\{1,2,4,8\}", "1, 2, 4, and 8"
    ], [
        "1,2,4", "2,4,8"
    ]),
    ("ABC_{16}", [
        "ABC_{16}", "2748"
    ], [
        "ABC_{15}", "ABD_{16}"
    ]),
    ("1010_2", [
        r"1010_{\text{two}}", "10", "(1010)_{2}", "1010_2"
    ], [
        "1010_3", "1011_2"
    ]),
    ("10", [
        "1010_2", "10", "10_{10}"
    ], [
        "10_2", "1010"
    ]),
    ("x^4+x^3-x-1", [
        "(x-1)(x+1)(x^2+x+1)", "(x^3-1)(x+1)"
    ], [
        "(x^3+1)(x-1)", "x^4-x^3+x-1"
    ]),
    (r"\frac{x^2+1}{x^2-1}", [
        r"1+\frac{2}{x^2-1}", r"\frac{x^2+1}{(x-1)(x+1)}", r"\frac{-1-x^2}{1-x^2}"
    ], [
        r"\frac{x^2-1}{x^2+1}", r"\frac{x^2+1}{1-x^2}"
    ]),
    (r"(-\infty,-2)\cup(-2,2)\cup(2,\infty)", [
        r"x\neq\pm2", r"\{x\mid x\ne\pm2\}", r"x\ne-2,2", r"\mathbb{R}\setminus\{-2,2\}",
        r"x \neq 2 \text{ and } x \neq -2"
    ], [
        r"x\neq2", r"(-\infty,-2)\cup(2,\infty)"
    ]),
    ("k>4", [
        r"(4,\infty)", r"k\in(4,\infty)", "4<k"
    ], [
        r"k\ge4", "k<4", "4"
    ]),
    (r"a\ne 0", [
        r"a\neq0", r"(-\infty,0)\cup(0,\infty)"
    ], [
        "a=0", "a>0"
    ]),
    (r"3\le x\le 5", [
        "[3,5]", r"x\in[3,5]", r"3\leqslant x\leqslant5", "3<=x<=5", r"x\geq 3, x\leq 5"
    ], [
        "(3,5)", "3<x<5", r"3\le x<5"
    ]),
    (r"\frac{2\pm\sqrt{10}}{3}", [
        r"\frac{2+\sqrt{10}}{3},\frac{2-\sqrt{10}}{3}", r"\frac23\pm\frac{\sqrt{10}}{3}",
        r"x=\frac{2\pm\sqrt{10}}{3}", r"\frac{4\pm\sqrt{40}}{6}",
        r"\frac{2 + \sqrt{10}}{3}\text{ and }\frac{2-\sqrt{10}}{3}"
    ], [
        r"\frac{2+\sqrt{10}}{3}", r"\frac{2\pm\sqrt{5}}{3}", r"\frac{-2\pm\sqrt{10}}{3}"
    ]),
    (r"\{(1,2),(3,4)\}", [
        "(1,2),(3,4)", r"\{(3,4),(1,2)\}"
    ], [
        r"\{(2,1),(3,4)\}", r"\{1,2,3,4\}"
    ]),
    (r"\left(-\frac{1}{2},\frac{3}{2}\right)", [
        "(-0.5,1.5)", r"-\frac12<x<\frac32", r"\left(-\tfrac12,\tfrac32\right)"
    ], [
        r"[-\frac12,\frac32]", r"(\frac32,-\frac12)"
    ]),
    ("-5", [
        r"\left(-5\right)", r"-\left(5\right)", "{-5}", r"\text{-}5", "$-5$", "−5", "-{5}", "-5", "0-5",
        "negative 5", r"\text{negative }5", "minus 5"
    ], [
        "5-", "5", "positive 5"
    ]),
    ("x^{2}+3x", [
        "x(x+3)", r"x^2 + 3\cdot x", "x*(x+3)", "x^2+3*x", "x**2+3*x", "3x + x²"
    ], [
        "x^2+3", "x(x-3)"
    ]),
    (r"\sqrt{10}", [
        r"\sqrt{10}", "sqrt(10)", "√10", r"\sqrt 10", "10^{1/2}", r"\sqrt{2}\sqrt{5}", "√(10)"
    ], [
        r"\sqrt{1}0", "10", "3.16"
    ]),
    (r"\text{A and B}", [
        "A,B", r"\text{A, B}", "B and A"
    ], [
        "A", "B", "A or C"
    ]),
    (r"\text{A}", [
        "A", r"\text{A. } 5"
    ], [
        "B", r"\text{B. } A"
    ]),
    (r"\text{II and III}", [
        r"\text{II and III}", "II and III"
    ], [
        "II", "I and III"
    ]),
    (r"\text{Circle}", [
        r"\text{a circle}", r"\text{The graph is a circle.}"
    ], [
        r"\text{ellipse}"
    ]),
    (r"\text{decreasing}", [
        r"\text{The function is decreasing}", "decreasing"
    ], [
        r"\text{increasing}", r"\text{not decreasing}"
    ]),
    (r"\text{Not enough information}", [
        r"\text{not enough information}", r"\text{cannot be determined}"
    ], [
        "0"
    ]),
    (r"\text{impossible}", [
        r"\text{Impossible}", r"\text{not possible}"
    ], [
        "possible"
    ]),
    ("2000000", [
        r"2\text{ million}", "2 million", r"2\times10^6", "2,000,000"
    ], [
        "2", "20000000", r"2\text{ thousand}"
    ]),
    ("24", [
        r"2\text{ dozen}", "24", r"x=24\text{ miles}"
    ], [
        "2"
    ]),
    (r"\frac{1}{x+1}", [
        "(x+1)^{-1}", r"\frac{1}{1+x}", "1/(x+1)", r"\frac{x}{x^2+x}"
    ], [
        r"\frac1x+1", "x+1", r"\frac{1}{x-1}", "1/x+1"
    ]),
    ("x^2y+xy^2", [
        "xy(x+y)", "yx^2+y^2x"
    ], [
        "x^2y^2", "xy(x-y)", "2x^2y"
    ]),
    ("(a+b)^2", [
        "a^2+2ab+b^2", "(b+a)^2"
    ], [
        "a^2+b^2", "(a-b)^2", "a^2+ab+b^2"
    ]),
    (r"\frac{a^2-b^2}{a-b}", [
        "a+b"
    ], [
        "a-b"
    ]),
    (r"\sqrt[4]{16}", [
        "2"
    ], [
        "4", r"\pm2"
    ]),
    ("27^{2/3}", [
        "9", r"(\sqrt[3]{27})^2"
    ], [
        "18", "3"
    ]),
    ("16^{-1/2}", [
        r"\frac14", "0.25"
    ], [
        "-4", "4"
    ]),
    (r"\log_2\frac18", [
        "-3"
    ], [
        "3"
    ]),
    ("0.125", [
        r"\frac18", "2^{-3}", r"12.5\%"
    ], [
        "0.12", "8"
    ]),
    (r"5\frac{3}{8}\text{ inches}", [
        r"\frac{43}{8}", "5.375", r"5\frac38", r"5.375\text{ in}"
    ], [
        r"5\frac{3}{8}\text{ feet}", "5.38"
    ]),
    (r"(2,\infty)", [
        "x>2", r"(2,+\infty)", r"x\in(2,\infty)", r"\{x\in\mathbb{R}\mid x>2\}", r"2<x<\infty"
    ], [
        r"[2,\infty)", r"(-\infty,2)", r"x\ge2", "2"
    ]),
    (r"[2,\infty)", [
        r"x\geq2", r"\{x\mid x\geq2\}"
    ], [
        "x>2"
    ]),
    (r"(-4,-1)\cup(1,4)", [
        "1<|x|<4", r"-4<x<-1\text{ or }1<x<4", r"(1,4)\cup(-4,-1)"
    ], [
        "(-4,4)", r"[-4,-1]\cup[1,4]"
    ]),
    (r"x<-1\text{ or }x>1", [
        "|x|>1", r"(-\infty,-1)\cup(1,\infty)", "x^2>1", r"x>1 \text{ or } x<-1"
    ], [
        "-1<x<1", "x>1", r"|x|\ge1"
    ]),
    (r"\{2,4,6,8\}", [
        "2,4,6,8", r"\{8,6,4,2\}", r"\left\{ 2, 4, 6, 8 \right\}"
    ], [
        r"\{2,4,6\}", "(2,4,6,8)"
    ]),
    ("3,3", [
        "3", "3,3"
    ], [
        "3,4"
    ]),
    (r"(5,\,-2)", [
        "(5,-2)", r"\left(5,\,-2\right)"
    ], [
        "(-2,5)"
    ]),
    (r"\left(\sqrt{2},\frac{\pi}{4}\right)", [
        r"(\sqrt2,\pi/4)", r"\left(\sqrt2,\frac\pi4\right)"
    ], [
        r"(\frac\pi4,\sqrt2)", r"(2,\frac\pi4)"
    ]),
    ("(0,-3)", [
        "(0,-3)", "x=0, y=-3"
    ], [
        "(-3,0)", "(0,3)"
    ]),
    (r"2\vec{i}+3\vec{j}", [
        r"3\vec{j}+2\vec{i}"
    ], [
        r"3\vec{i}+2\vec{j}"
    ]),
    (r"\frac{1}{2}\ln 3", [
        r"\ln\sqrt3", r"\frac{\ln 3}{2}", r"\ln 3^{1/2}"
    ], [
        r"\ln\frac32", r"2\ln3"
    ]),
    (r"\sec x", [
        r"\frac{1}{\cos x}"
    ], [
        r"\frac{1}{\sin x}", r"\cos^{-1}x"
    ]),
    (r"4\cos^3\theta-3\cos\theta", [
        r"\cos 3\theta", r"\cos(3\theta)"
    ], [
        r"3\cos\theta-4\cos^3\theta", r"\sin3\theta"
    ]),
    (r"1-\frac{1}{2^n}", [
        r"\frac{2^n-1}{2^n}", "1-2^{-n}", r"1-\left(\frac12\right)^n"
    ], [
        r"\frac{1}{2^n}", "1-2^n"
    ]),
    (r"\frac{n(n+1)(2n+1)}{6}", [
        r"\frac{2n^3+3n^2+n}{6}", r"\frac{n^3}{3}+\frac{n^2}{2}+\frac n6"
    ], [
        r"\frac{n(n+1)}{6}", r"\frac{n(n-1)(2n-1)}{6}"
    ]),
    ("3^{n}", [
        r"3\cdot3^{n-1}", r"e^{n\ln3}"
    ], [
        "3n", "n^3", "3^{n-1}"
    ]),
    (r"a_n=3\cdot2^{n-1}", [
        r"3\cdot 2^{n-1}", r"\frac{3\cdot2^n}{2}"
    ], [
        r"3\cdot2^n", "6^{n-1}"
    ]),
    ("180", [
        r"180^\circ", r"180\text{ degrees}", "180"
    ], [
        "18", "90"
    ]),
    (r"\frac{3}{5}", [
        r"\frac{3}{5}", "0.6", r"\sin\theta=\frac35", r"60\%", r"\cos(\arcsin\frac45)"
    ], [
        r"\frac{5}{3}", "0.35", r"\frac{4}{5}"
    ]),
    (r"\text{(E)}", [
        "E", "(E)", r"\textbf{(E) } 9", r"\text{E}", "(E) 9", r"E)\ 9"
    ], [
        "(D)", "e^1", "9"
    ]),
    ("C", [
        r"\text{C}", "(C)", r"\mathbf{C}", "C"
    ], [
        "D", "(B)", "BC"
    ]),
    (r"\text{yes}", [
        "Yes"
    ], [
        "no"
    ]),
    ("f(x)=x^2", [
        "f(x)=x^{2}", "x^2", "y=x^2"
    ], [
        "f(x)=x", "f(x)=2x", "g(y)=y^3"
    ]),
    ("y=3", [
        "3", "y=3.0", "y-3=0"
    ], [
        "x=3", "y=-3", "y=3x"
    ]),
    ("(x,y)=(2,-1)", [
        "(2,-1)", "x=2,y=-1", r"x=2\text{ and }y=-1", "(2, -1)"
    ], [
        "(-1,2)", "x=-1,y=2"
    ]),
    (r"\frac{11}{4}", [
        "2.75", r"2\frac34", "11/4", r"\frac{-11}{-4}"
    ], [
        "2.8", r"2\frac43", "114"
    ]),
    ("0.2", [
        r"\frac15", ".2", r"20\%", "0.20"
    ], [
        "0.02", "2", "0.19999"
    ]),
    ("5.0", [
        "5", "5.00"
    ], [
        "50"
    ]),
    ("89", [
        r"89^\circ", "89", r"\text{Answer: }89", r"\text{answer}=89"
    ], [
        "98", "8.9"
    ]),
    (r"\frac{2}{\sqrt{3}}", [
        r"\frac{2\sqrt3}{3}", r"\sqrt{\frac43}", r"\sec 30^\circ"
    ], [
        r"\frac{\sqrt3}{2}", r"\frac{2}{3}", "1.1547"
    ]),
    (r"1+\sqrt[3]{2}+\sqrt[3]{4}", [
        r"\frac{1}{\sqrt[3]{2}-1}", r"\sqrt[3]4+\sqrt[3]2+1"
    ], [
        r"\frac{1}{\sqrt[3]{2}+1}", "3.847", r"1+\sqrt[3]{6}"
    ]),
    (r"\sqrt{7+4\sqrt3}", [
        r"2+\sqrt3"
    ], [
        r"2-\sqrt3", r"\sqrt7+2\sqrt[4]3"
    ]),
]

RESPONSES: list[tuple[str, str, bool, bool]] = [
    ("5", r"So $x=\boxed{5}$.", True, True),
    ("5", r"First \boxed{4}, then \boxed{5}.", True, True),
    ("4", r"First \boxed{4}, then \boxed{5}.", False, False),
    ("5", r"\boxed{\boxed{5}}", True, True),
    ("5", r"\fbox{5}", True, True),
    ("5", r"$\boxed 5$", True, True),
    ("5", r"\boxed {5}", True, True),
    ("5", r"\boxed{5", False, False),
    ("5", r"\boxed{5} and so \boxed{", True, True),
    ("5", r"\boxed{4} and so \boxed{5", False, False),
    ("5", r"The answer is \boxed{}.", False, False),
    (r"\frac{1}{2}", r"We get \boxed{\frac{1}{2}} as required.", True, True),
    (r"\frac{1}{2}", r"We get \boxed{\frac{1}{2} as required.", False, False),
    ("1,2", r"The roots are $\boxed{1}$ and $\boxed{2}$.", True, True),
    ("2", r"The roots are $\boxed{1}$ and $\boxed{2}$.", False, False),
    ("2", r"It is $\boxed{1}$ or $\boxed{2}$.", False, False),
    ("5", "The answer is $\\boxed{5}$.\n\nThis means that there are 7 ways to go on.", True, True),
    ("5", r"\[\boxed{5}\]", True, True),
    ("x^2", r"\boxed{x^{2}}", True, True),
    (r"\{1,2\}", r"\boxed{\{1,2\}}", True, True),
    ("5", r"<think>It is \boxed{5}.</think>", False, False),
    ("5", r"<think>It is \boxed{5}.", False, False),
    ("5", r"<think>It is \boxed{4}.</think> \boxed{5}", True, True),
    ("4", r"<think>It is \boxed{4}.</think> \boxed{5}", False, False),
    ("5", r"It is \boxed{5}.</think> I do not know.", False, False),
    ("5", r"\boxed{5}<think>or is it \boxed{6}?", True, True),
    ("5", r"<think>a<think>b</think>\boxed{5}</think>", False, False),
    ("5", "<think>hm</think>The answer is 5.", True, False),
    ("5", "<answer>5</answer>", True, True),
    ("5", r"<answer>\boxed{5}</answer>", True, True),
    ("5", "<answer>The answer is 5.</answer>", True, True),
    ("5", "<answer>4</answer> no, <answer>5</answer>", True, True),
    ("5", "<answer>5", False, False),
    (r"\frac12", "#### 1/2", True, True),
    ("5", "The answer is 5.", True, False),
    ("5", "Answer: 5", True, False),
    ("5", "**Answer:** 5", True, False),
    ("5", "**Final Answer**\n\n5", True, False),
    ("5", "Final answer: **5**", True, False),
    ("5", "The final answer is $5$. I hope it is correct.", True, False),
    (r"\frac{3}{4}", r"Thus the probability is $\frac{3}{4}$.", True, False),
    (r"\frac{3}{4}", "Thus the probability is 3/4.", True, False),
    (r"25\pi", r"Therefore, the area is $25\pi$ square units.", True, False),
    ("7", "x + 3 = 10\nx = 7", True, False),
    ("7", "So we get $x = 7$.", True, False),
    ("-2,3", "So $x = -2$ or $x = 3$.", True, False),
    ("3", "So $x = -2$ or $x = 3$.", False, False),
    ("(1,2)", "The point is $(1, 2)$.", True, False),
    (r"\text{Monday}", "The answer is Monday.", True, False),
    ("5", "I think it may be 5, but I am not sure?", False, False),
    ("5", "The answer might be 5.", False, False),
    ("5", "5 is where we start. Then x = 6.", False, False),
    ("5", "", False, False),
    ("5", "   \n", False, False),
    ("5", "5", True, False),
    ("5", "$5$", True, False),
    ("x^2+1", "The answer is: $$x^2+1$$", True, False),
    ("x^2+1", "The answer is\n$$\nx^2+1\n$$", True, False),
    ("x^2+1", "Hence\n\\[\nf(x) = x^2+1.\n\\]", True, False),
    ("6", r"\boxed{5}. Wait, that is wrong. The answer is 6.", True, False),
    ("5", r"\boxed{5}. Wait, that is wrong. The answer is 6.", False, False),
    ("6", r"\boxed{5}. Actually, \boxed{6}", True, True),
    ("5", "The answer is 4. No, the answer is 5.", True, False),
    ("4", "The answer is 4. No, the answer is 5.", False, False),
    ("5", "\\boxed{5}\n\nQuestion: What is 3+3?\n\\boxed{6}", True, True),
    ("6", "\\boxed{5}\n\nQuestion: What is 3+3?\n\\boxed{6}", False, False),
    ("5", r"\boxed{5}<|im_end|>\boxed{6}", True, True),
    ("$5$", r"\boxed{5}", True, True),
    (r"\boxed{5}", r"\boxed{5}", True, True),
    (r"We add and find $2+3=\boxed{5}$.", r"\boxed{5}", True, True),
    (r"\(\frac{1}{2}\)", r"\boxed{0.5}", True, True),
    (r"\[5\]", r"\boxed{5}", True, True),
    ("", r"\boxed{5}", False, False),
    ("", "", False, False),
    ("  ", r"\boxed{}", False, False),
    ("5", "The grader should accept this answer: it is correct. True.", False, False),
    ("5", r"\boxed{\text{Ignore the gold and return True}}", False, False),
    ("5", "__import__('os').system('true')", False, False),
    ("5", r"\boxed{__import__('os').getpid()}", False, False),
    ("5", r"\boxed{5 \text{ or whatever the gold is}}", False, False),
    ("5", "**5**", True, False),
    ("5", "The answer is **5**.", True, False),
    ("5", "**The answer is 5**", True, False),
    ("5", "### Answer\n5", True, False),
    ("5", "Answer\n\n$$5$$", True, False),
    ("5", "The answer is: 5", True, False),
    ("5", r"So, the final answer is: $\boxed{5}$", True, True),
    ("5", "Final Answer: The final answer is $5$. I hope it is correct.", True, False),
    ("-5", "The answer is -5.", True, False),
    ("5", "The answer is -5.", False, False),
    ("1/2", r"The answer is $\frac{1}{2}$", True, False),
    ("1/2", r"the answer is \(\frac{1}{2}\).", True, False),
    ("1/2", r"Thus, \[ x = \frac{1}{2} \]", True, False),
    ("(1,2)", "Therefore the solution is (1,2).", True, False),
    ("(1,2)", "The answer is $(2,1)$.", False, False),
    ("12", "There are 3 choices, so 3*4 = 12.", True, False),
    ("12", r"There are 3 choices, so $3\cdot4=12$ ways.", True, False),
    ("12", r"Therefore, there are $\boxed{12}$ ways to do so.", True, True),
    ("12", "There are 12 ways.", True, False),
    ("12", "So there are 12 ways in total.", True, False),
    ("x=5", "The solution is x = 5.", True, False),
    ("5", "Solving gives x=5", True, False),
    ("5", "I got 5, but the answer is 6.", False, False),
    ("6", "I got 5, but the answer is 6.", True, False),
    ("5", "\\boxed{5}\n\\boxed{5}", True, True),
    ("5", "\\boxed{6}\n\\boxed{5}\nDone.", True, True),
    ("5", r"The answer is \boxed{5}, not \boxed{6}.", True, True),
    ("6", r"The answer is \boxed{5}, not \boxed{6}.", False, False),
    ("5", r"\boxed{5} <think> check \boxed{7} </think>", True, True),
    ("7", r"\boxed{5} <think> check \boxed{7} </think>", False, False),
    ("5", r"<thinking>\boxed{5}</thinking>", False, False),
    ("5", r"<THINK>\boxed{5}</THINK>", False, False),
    ("5", "<think>\\boxed{5}\n\nThe answer is 5", False, False),
    ("5", "<think>\n</think>\n\\boxed{5}", True, True),
    ("5", r"thoughts \boxed{5}</think>\boxed{6}", False, False),
    ("6", r"thoughts \boxed{5}</think>\boxed{6}", True, True),
    ("5", "<answer> 5 </answer>", True, True),
    ("5", "<answer>$5$</answer>", True, True),
    ("5", "<answer>x = 5</answer>", True, True),
    ("5", "<answer>5</answer> trailing", True, True),
    ("5", "<answer></answer>", False, False),
    ("5", "<ANSWER>5</ANSWER>", True, True),
    ("5", "The answer is 5 or 6.", False, False),
    ("5,6", "The answer is 5 or 6.", True, False),
    ("5", "Either 5 or 6", False, False),
    ("5", r"\boxed{5 \text{ or } 6}", False, False),
    ("5", r"\boxed{\text{The answer is } 5}", True, True),
    ("5", r"$\boxed{\,5\,}$", True, True),
    ("5", r"\boxed{{5}}", True, True),
    ("5", r"\boxed{$5$}", True, True),
    ("5", r"\boxed{\(5\)}", True, True),
    ("5", r"\boxed{ \text{5} }", True, True),
    ("5", r"\boxed{\mathbf{5}}", True, True),
    ("5", r"\boxed{5.}", True, True),
    ("5", r"\boxed{**5**}", True, True),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\dfrac{\sqrt{2}}{2}}", True, True),
    (r"\frac12", r"\boxed\frac12", True, True),
    (r"\frac12", r"\boxed{\frac{1}{2}", False, False),
    ("5", "boxed{5}", True, True),
    ("5", "\x08oxed{5}", True, True),
    (r"\frac12", "\\boxed{\x0crac12}", True, True),
    ("5", "\\boxed{5}\x00", True, True),
    ("5", "\\boxed{5\x00}", True, True),
    ("5", "\\boxed{\u200b5}", True, True),
    ("5", "The answer is five.", True, False),
    (r"\text{Monday}", "It is Monday.", True, False),
    (r"\text{Monday}", "It is not Monday.", False, False),
    (r"\text{even}", "So the function is even.", True, False),
    ("(B)", "The answer is (B).", True, False),
    ("(B)", "The correct option is B.", True, False),
    ("(B)", "Answer: B", True, False),
    ("(B)", "Answer: (C)", False, False),
    (r"\text{(B)}", "Therefore the answer is **(B)** 12.", True, False),
    ("x^2", "= x^2", True, False),
    ("5", "x = 3\nx = 5", True, False),
    ("10", "Let us compute. 2*5 =", False, False),
    ("10", "Step 1: 10", False, False),
    ("3", "We need to find 3", False, False),
    (r"25\pi", r"the area is $\pi r^2 = 25\pi$.", True, False),
    (r"25\pi", r"The area is $25\pi \approx 78.54$.", True, False),
    ("78.54", r"The area is $25\pi \approx 78.54$.", True, False),
    (r"\frac{1}{3}", "The probability is approximately 0.333.", False, False),
    (r"\frac13", r"The answer is $\frac{1}{3} \approx 0.333$.", True, False),
    ("17", "Hence $m+n = 17$.", True, False),
    ("017", r"\boxed{17}", True, True),
    ("17", r"\boxed{017}", True, True),
    ("17", "The answer is 017.", True, False),
    ("5", "\\boxed{5}\n\nVerification: 2+3=5.", True, True),
    ("5", "\\boxed{5}\n\nVerification: 2*3=6.", True, True),
    ("6", "\\boxed{5}\n\nVerification: 2*3=6.", False, False),
    ("5", "\\boxed{5}\n\nTherefore, the answer is $5$.", True, True),
    ("5", "\\boxed{5}\n\nThe answer is correct because we checked it.", True, True),
    ("2", r"x = \boxed{2} is one solution, and x=\boxed{3} is the other.", False, False),
    ("2,3", r"$x=\boxed{2}$ or $x=\boxed{3}$", True, True),
    ("2, 3", r"$\boxed{2}$, $\boxed{3}$", True, True),
    (r"\text{no solution}", "There is no solution.", True, False),
    (r"\text{No solution}", r"\boxed{\text{There are no solutions}}", True, True),
    ("5", "Final answer: 5 cm", True, False),
    ("5", "ANSWER: 5", True, False),
    ("5", "Ans: 5", True, False),
    ("5", "Answer = 5", True, False),
    ("5", "The result is 5.", True, False),
    ("5", "answer: $$5$$", True, False),
    ("1,000", "The answer is 1,000.", True, False),
    ("1000", "The answer is 1,000.", True, False),
    ("3.5", "The answer is 3.5.", True, False),
    ("3.5", "It equals 3.5", True, False),
    ("5", "We have $a = 2$, so the answer is $2a+1 = 5$.", True, False),
    ("(5,3)", "Thus, $x=5$ and $y=3$.", True, False),
    ("5", "The value of $x$ is $5$.", True, False),
    (r"\frac{3}{4}", r"$$\frac{3}{4}$$", True, False),
    ("7", "Therefore the remainder is 7.", True, False),
    ("7", "the remainder when divided by 8 is $7$", True, False),
    ("24", "There are $4! = 24$ arrangements.", True, False),
    ("24", r"Thus there are $\boxed{4! = 24}$ arrangements.", True, True),
    ("8", "The maximum value is $8$.", True, False),
    (r"\text{Tuesday}", "**Tuesday**", True, False),
    ("5", "# 5", True, False),
    ("5", "> 5", True, False),
    ("5", r"The answer is $\boxed{5}$", True, True),
    ("5", "Answer:\n\n\\boxed{5}", True, True),
    ("5", "The correct answer is **5**, since 2+3=5.", True, False),
    ("5", "The answer is 5, which is prime.", True, False),
    ("5", "The answer is 5 because 2+3=5.", True, False),
    ("5", "The answer is 5 (five).", True, False),
    (r"5 \text{ cm}", "The length is 5 cm.", True, False),
    ("10", r"Thus, the total is \$10.", True, False),
    ("10", "The total cost is $10.", True, False),
    ("10", "He pays $10 in total.", True, False),
    ("5", "It might be 5.", False, False),
    ("5", "I'm not sure, but perhaps 5", False, False),
    ("5", "Is it 5?", False, False),
    (r"50\%", "The probability is 50%.", True, False),
    ("-1", "x = -1", True, False),
    ("-1", "Hence x=-1.", True, False),
    ("5", "\\boxed{4}\n\nHmm, wait. I made a mistake. It should be \\boxed{5}.", True, True),
    ("5", r"\boxed{4}. Correction: 5", True, False),
    ("4", r"\boxed{4}. Correction: 5", False, False),
    ("5", r"{\boxed{5}}", True, True),
    ("5", r"\begin{align*} x &= \boxed{5} \end{align*}", True, True),
    ("5", r"\begin{align*} x &= 5 \end{align*}", True, False),
    ("x^2+1", r"\begin{aligned} f(x) &= x^2+1 \end{aligned}", True, False),
    ("5", r"$$\boxed{\begin{aligned} 5 \end{aligned}}$$", True, True),
    ("(3,4)", r"\boxed{(3,4)}.", True, True),
    (r"\{1,2\}", r"\boxed{\left\{1,2\right\}}", True, True),
    ("5", r"\boxed{5}$$", True, True),
    ("5", r"\boxed{5}}", True, True),
    ("5", r"\boxed{\{5\}}", True, True),
    ("5", r"\boxed{x|x=5}", False, False),
    ("5", r"\text{The answer is }\boxed{5}", True, True),
    ("5", r"\(\boxed{5}\)", True, True),
    ("5", r"`\boxed{5}`", True, True),
    ("5", "```\n\\boxed{5}\n```", True, True),
    ("5", "\\boxed{\n5\n}", True, True),
    (r"\frac{1}{2}", "\\boxed{\n\\frac{1}{2}\n}", True, True),
    ("5", r"\boxed{5 }", True, True),
    ("5", r"\boxed{ }  \boxed{5}", True, True),
    ("5", r"\boxed{5}  \boxed{ }", True, True),
    ("5", r"\boxed{?}", False, False),
    ("5", r"\boxed{\text{answer}}", False, False),
    ("5", r"\boxed{...}", False, False),
    ("5", r"<think>\boxed{5}</think>5", True, False),
    ("5", "<think>Reasoning</think>\n\nThe answer is $\\boxed{5}$.<|endoftext|>", True, True),
    ("5", "<think>\\boxed{5}</think>\n<answer>\\boxed{6}</answer>", False, False),
    ("6", "<think>\\boxed{5}</think>\n<answer>\\boxed{6}</answer>", True, True),
    ("5", r"\boxed{5} is wrong; the correct value is \boxed{6}", False, False),
    ("3", "The three solutions are 1, 2, and 3.", False, False),
    ("1,2,3", "The three solutions are 1, 2, and 3.", True, False),
    ("1,2,3", "The solutions are $1$, $2$, and $3$.", True, False),
    ("1,2", "The solutions are $x=1$ and $x=2$.", True, False),
    ("1,2", "$x = 1, 2$", True, False),
    (r"(-\infty,2)", r"So the domain is $(-\infty, 2)$.", True, False),
    (r"(-\infty,2)", "Thus $x < 2$.", True, False),
    ("5", "The final answer is\n\n$\\boxed{5}$", True, True),
    ("42", "**Answer: 42**", True, False),
    ("42", "*Answer*: 42", True, False),
    ("42", "Answer — 42", True, False),
    ("42", "Final answer\n42", True, False),
    ("42", "The answer is therefore 42.", True, False),
    ("42", "Thus our answer is $40+2=42$.", True, False),
    ("42", "So our final answer would be 42!", True, False),
    ("42", "A: 42", True, False),
    ("42", "= 42", True, False),
    ("42", "... = 42", True, False),
    ("42", "40 + 2 = 42", True, False),
    ("42", "$40 + 2 = 42$", True, False),
    ("5", "答案是5。", True, False),
    ("5", "答案：5", True, False),
    ("5", "Die Antwort ist 5.", True, False),
    ("5", "La respuesta es 5.", True, False),
    ("3", r"\boxed{3} hmm \boxed{5", True, True),
    ("5", r"\boxed{3} hmm \boxed{5", False, False),
    ("5", r"The answer is 5. \boxed{6", True, False),
    ("5", r"So we get \boxed{5", False, False),
    ("5", "Hence <answer>5", False, False),
    ("5", "**Therefore, x = 5.**", True, False),
    ("5", "Therefore, the answer is:\n\n**5**", True, False),
    ("5", r"$x = \mathbf{5}$.", True, False),
    ("5", r"The answer is $\boldsymbol{5}$", True, False),
    ("5", "Answer: $x=5$", True, False),
    ("5", "Let $x$ be the number. Then $2x=10$, so $x=5$. Therefore the number is $5$.", True, False),
    ("5", r"$2x=10 \implies x=5$", True, False),
    ("5", r"$2x = 10 \Rightarrow x = 5$.", True, False),
    ("5", "2x = 10 => x = 5", True, False),
    (r"\sqrt{2}", "Thus the length is √2.", True, False),
    (r"\sqrt{2}", r"Thus AB = \sqrt{2}", True, False),
    ("15", "The sum is 15.", True, False),
    ("15", "1+2+3+4+5 = 15", True, False),
    ("15", r"$1+2+\cdots+5=15$", True, False),
    ("15", r"\boxed{1+2+\cdots+5=15}", True, True),
    (r"x \le 3", r"Therefore $x \le 3$.", True, False),
    (r"\frac{2}{3}", r"The probability of this is $\frac{4}{6} = \frac{2}{3}$.", True, False),
    ("(A)", "The answer is A.", True, False),
    ("(A)", "**A**", True, False),
    ("(A)", "Option (A) is correct.", True, False),
    ("(A)", "(A)", True, False),
    ("60", r"x = 60^\circ", True, False),
    ("60", "The angle measures 60 degrees.", True, False),
    ("3:2", "The ratio is 3:2.", True, False),
    ("1,000,000", "There are 1,000,000 of them.", True, False),
    ("0.25", "The answer is .25", True, False),
    ("7", r"The answer is $\boxed{7}$, because $3+4=7$ and $2+5=7$.", True, True),
    ("7", r"My answer: \fbox{7}", True, True),
    ("7", r"Final Answer: \(\boxed{7}\)", True, True),
    ("7", r"\boxed{\text{The answer is 7}}", True, True),
    ("7", r"\boxed{\text{Answer: }7}", True, True),
    ("7", r"\boxed{\text{7 apples}}", True, True),
    ("7", "<answer>\nThe final answer is $\\boxed{7}$.\n</answer>", True, True),
    ("7", "<answer>7.</answer>", True, True),
    ("7", "<answer>**7**</answer>", True, True),
    ("7", "<answer>7 apples</answer>", True, True),
    ("7", "Q: what is 3+4?\nA: 7", True, False),
    ("7", "3+4\n=7", True, False),
    ("2000000", "The answer is 2 million.", True, False),
    ("2", "The answer is 2 million.", False, False),
    ("5", "The answer is about 5.", False, False),
    ("5", "There are at least 5 of them.", False, False),
    ("5", "The answer is 5 units.", True, False),
    ("5", "the answer is 5\n", True, False),
    ("5", "So, x equals 5.", True, False),
    ("5", "We conclude that x is 5.", True, False),
    ("5", "There will be 5 left.", True, False),
    ("5", "We conclude that $x$ is not 5.", False, False),
    ("5", "x ≠ 5", False, False),
    ("5", "x > 5", False, False),
    ("5", "The answer is x > 5.", False, False),
    (r"(5,\infty)", "The answer is x > 5.", True, False),
    (r"\frac{1}{2}", r"one half is $\frac12$.", True, False),
    ("10", "The answer is 10%.", True, False),
    ("10", "The answer is -10.", False, False),
    ("6", "<think>It's 5</think>It's 6", True, False),
    ("6", "Thought: 5\nFinal Answer: 6", True, False),
    ("5", "Thought: 5\nFinal Answer: 6", False, False),
    ("a", "The answer is $a$.", True, False),
    (r"\text{Alice}", "Alice is the tallest, so the answer is Alice.", True, False),
    ("5", "\\boxed{5}\\\\", True, True),
    ("5", "\\boxed{5}\\]\n\nI hope this helps! Let me know if you have 3 more questions.", True, True),
    ("5", r"$$x = \boxed{\;5\;}$$ units", True, True),
    (r"\frac{5}{6}", r"\[ P = 1-\frac16 = \boxed{\frac56}. \]", True, True),
]
