"""Slow reference of the paper's formulas: plain Python floats, one loop per sum, written from the paper and not from the package.

Vectors are lists of floats, tables are `table[a][y]`, labels are ints. Everything in nats. Logarithms of soft assignments are carried
along, so that assignments that underflow to 0 keep their meaning (0 log 0 = 0).
"""
from math import exp, inf, isnan, log, sqrt

import torch

FLOOR = 1e-6  # of a probability whose logarithm is taken; DESIGN, section 7


def squared_distance(u, v):
    return sum((a - b) ** 2 for a, b in zip(u, v, strict=True))


def log_sum_exp(values):
    top = max(values)
    return top + log(sum(exp(v - top) for v in values))


def times(p, log_of_something):
    "p * log(...) with 0 log 0 = 0."
    return 0.0 if p == 0 else p * log_of_something


def floored(column):
    "Raised to at least FLOOR and renormalised."
    raised = [max(v, FLOOR) for v in column]
    return [v / sum(raised) for v in raised]


# --- Section 3.1: assignments


def unit(v):
    length = sqrt(sum(a * a for a in v))
    return [a / length for a in v] if length else list(v)


def log_phi(z, centroids, temperature=1.0, normalize=False, present=None):
    "log φ(Z_i, a) for one sample: softmax over classes of minus squared distances."
    if normalize:
        z, centroids = unit(z), [unit(c) for c in centroids]
    logits = [-squared_distance(z, c) / temperature for c in centroids]
    if present is not None:
        logits = [v if here else -inf for v, here in zip(logits, present, strict=True)]
    total = log_sum_exp(logits)
    return [v - total for v in logits]


def class_means(features, labels, num_classes):
    "Mean feature vector per class; zeros for a class without samples. Labels that are None do not count."
    means = []
    for a in range(num_classes):
        members = [f for f, y in zip(features, labels, strict=True) if y == a]
        means.append([sum(f[d] for f in members) / len(members) if members else 0.0 for d in range(len(features[0]))])
    return means


# --- Appendix A: pairs, bounds


def log_pair(z, centroids, x, other_centroids):
    "log φ(Z_i ∈ a, X_i ∈ y), Eqs. (3) and (4): one softmax over all C² pairs of the sum of both squared distances."
    logits = [[-squared_distance(z, f) - squared_distance(x, c) for c in other_centroids] for f in centroids]
    total = log_sum_exp([v for row in logits for v in row])
    return [[v - total for v in row] for row in logits]


def u_term(z, centroids, x, input_centroids, prior):
    "U_i of Theorem 3.1, and the summand of Eq. (5)."
    pair, own = log_pair(z, centroids, x, input_centroids), log_phi(z, centroids)
    return sum(times(exp(lp), lp - log(prior[y]) - own[a]) for a, row in enumerate(pair) for y, lp in enumerate(row))


def v_term(z, centroids, other, other_centroids, q):
    "V_i of Theorem 3.1, and the summand of Eq. (8)."
    pair = log_pair(z, centroids, other, other_centroids)
    return sum(exp(lp) * log(q[a][y]) for a, row in enumerate(pair) for y, lp in enumerate(row))


def ibb_terms(z, centroids, x, input_centroids, other, other_centroids, prior, q):
    "U_i - V_i for every sample."
    return [u_term(z[i], centroids, x[i], input_centroids, prior) - v_term(z[i], centroids, other[i], other_centroids, q) for i in range(len(z))]


def ibb_fused_terms(z, centroids, xs, input_centroids, labels, prior, q):
    "Summands of Eq. (11), for any number of modalities."
    terms = []
    for i, y in enumerate(labels):
        inputs = sum(u_term(z[i], centroids, x[i], c, prior) for x, c in zip(xs, input_centroids, strict=True))
        own = log_phi(z[i], centroids)
        terms.append(inputs - sum(exp(own[a]) * (1 if y == b else 0) * log(q[a][b]) for a in range(len(q)) for b in range(len(q))))
    return terms


def algorithm_3(phi, labels, num_classes):
    "Algorithms 3 and 4, line by line: Q[a][y]. A class without samples has no mean: its column is uniform (DESIGN, section 6)."
    q = [[0.0] * num_classes for _ in range(num_classes)]
    count = [0] * num_classes
    for i, y in enumerate(labels):
        if y is None:
            continue
        for a in range(num_classes):
            q[a][y] += phi[i][a]
        count[y] += 1
    for y in range(num_classes):
        for a in range(num_classes):
            q[a][y] = q[a][y] / count[y] if count[y] else 1 / num_classes
    return q


def floored_table(q):
    "Every column raised to the floor and renormalised."
    columns = [floored([row[y] for row in q]) for y in range(len(q))]
    return [[columns[y][a] for y in range(len(q))] for a in range(len(q))]


def class_frequencies(labels, num_classes):
    known = [y for y in labels if y is not None]
    return [sum(y == a for y in known) / len(known) if known else 1 / num_classes for a in range(num_classes)]


# --- Section 3.1: the quantities themselves


def mutual_information(joint):
    rows, columns = [sum(row) for row in joint], [sum(column) for column in zip(*joint, strict=True)]
    return sum(times(p, log(p / (rows[a] * columns[y])) if p else 0) for a, row in enumerate(joint) for y, p in enumerate(row))


def information(phi, other):
    "I from two lists of soft assignments."
    n, k = len(phi), len(phi[0])
    return mutual_information([[sum(phi[i][a] * other[i][y] for i in range(n)) / n for y in range(k)] for a in range(k)])


# --- the tighter bound (DESIGN, section 5, fact 5)


def kl(p, q):
    return sum(times(a, log(a / b) if a else 0) for a, b in zip(p, q, strict=True))


def tight_terms(phi, other, q):
    "Σ_y φ'_i(y) KL(φ_i ‖ Q(·|y)) for every sample."
    k = len(q)
    return [sum(other[i][y] * kl(phi[i], [q[a][y] for a in range(k)]) for y in range(k)) for i in range(len(phi))]


def tight_fused_terms(phi, labels, q, r, num_modalities):
    "KL(φ_i ‖ Q(·|Y_i)) + (M-1) KL(φ_i ‖ r) for every sample."
    return [kl(p, [row[y] for row in q]) + (num_modalities - 1) * kl(p, r) for p, y in zip(phi, labels, strict=True)]


# --- Algorithm 1's bookkeeping


def groups_of(targets, num_classes, multi_label):
    "Labels per group, None where unknown: one group of C for class indices, one of two per label."
    if not multi_label:
        return [[None if y < 0 else y for y in targets]], num_classes
    return [[None if isnan(row[g]) else int(row[g]) for row in targets] for g in range(num_classes)], 2


class SlowLoss:
    """The regulariser of M modalities and the fused representation, with statistics renewed over whole epochs as in Algorithm 1.

    `z` is a list of M + 1 lists of vectors, the fused representation last; `mask[j][i]` says whether sample i has modality j.
    """

    def __init__(self, num_modalities, num_classes, dim, multi_label=False, bound="paper", temperature=1.0, normalize=False, optimal=False):
        self.m, self.num_classes, self.multi_label, self.bound, self.optimal = num_modalities, num_classes, multi_label, bound, optimal
        self.options = {"temperature": temperature, "normalize": normalize}
        self.k, self.g = (2, num_classes) if multi_label else (num_classes, 1)
        sources, k = range(num_modalities + 1), self.k
        self.centroids = [[[[0.0] * dim for _ in range(k)] for _ in range(self.g)] for _ in sources]
        self.present = [[[True] * k for _ in range(self.g)] for _ in sources]
        self.q = [[[[1 / k] * k for _ in range(k)] for _ in range(self.g)] for _ in sources]
        self.pair_q = {(j, o): [[[1 / k] * k for _ in range(k)] for _ in range(self.g)] for j in range(self.m) for o in range(self.m)}
        self.r = [[[1 / k] * k for _ in range(self.g)] for _ in sources]
        self.prior = [[1 / k] * k for _ in range(self.g)]

    def assignments(self, z):  # [source][group][i][a]
        return [[[[exp(v) for v in log_phi(row, self.centroids[s][g], present=self.present[s][g], **self.options)] for row in z[s]]
                 for g in range(self.g)] for s in range(self.m + 1)]

    def _pair(self, phi, j, other, i):
        total = 0.0
        for g in range(self.g):
            q = self.pair_q[j, other][g] if self.optimal else self.q[j][g]
            mine, theirs = phi[j][g][i], phi[other][g][i]
            if self.bound == "tight":
                total += tight_terms([mine], [theirs], q)[0]
            else:
                total -= sum(mine[a] * theirs[y] * log(q[a][y]) for a in range(self.k) for y in range(self.k))
        return total / self.g

    def _fused(self, phi, labels, i):
        values = []
        for g in range(self.g):
            y, mine = labels[g][i], phi[-1][g][i]
            if y is None:
                continue
            if self.bound == "tight":
                values.append(tight_fused_terms([mine], [y], self.q[-1][g], self.r[-1][g], self.m)[0])
            else:
                values.append(-sum(mine[a] * log(self.q[-1][g][a][y]) for a in range(self.k)))
        return sum(values) / len(values) if values else None

    def terms(self, z, targets, mask=None):
        "One value per modality, and the fused one last."
        n = len(targets)
        mask = mask or [[True] * n] * self.m
        labels, _ = groups_of(targets, self.num_classes, self.multi_label)
        phi, found = self.assignments(z), []
        for j in range(self.m):
            values = []
            for i in range(n):
                partners = [o for o in range(self.m) if o != j and mask[j][i] and mask[o][i]]
                if partners:
                    values.append(sum(self._pair(phi, j, o, i) for o in partners) / len(partners))
            found.append(sum(values) / len(values) if values else 0.0)
        fused = [v for v in (self._fused(phi, labels, i) for i in range(n)) if v is not None]
        return [*found, sum(fused) / len(fused) if fused else 0.0]

    def renew(self, z, targets, mask=None):
        "Lines 13 to 19 of Algorithm 1: Q and the marginal under the old centroids, then the new centroids."
        n, k = len(targets), self.k
        mask = [*(mask or [[True] * n] * self.m), [True] * n]
        labels, _ = groups_of(targets, self.num_classes, self.multi_label)
        phi = self.assignments(z)
        for s in range(self.m + 1):
            for g in range(self.g):
                known = [y if here else None for y, here in zip(labels[g], mask[s], strict=True)]
                self.q[s][g] = floored_table(algorithm_3(phi[s][g], known, k))
                rows = [p for p, y in zip(phi[s][g], known, strict=True) if y is not None]
                self.r[s][g] = floored([sum(p[a] for p in rows) / len(rows) if rows else 1 / k for a in range(k)])
                self.centroids[s][g] = class_means(z[s], known, k)
                self.present[s][g] = [a in known for a in range(k)]
        self.prior = [floored(class_frequencies(labels[g], k)) for g in range(self.g)]
        for (j, o), tables in self.pair_q.items():
            for g in range(self.g):
                rows = [i for i in range(n) if mask[j][i] and mask[o][i]]
                joint = [[sum(phi[j][g][i][a] * phi[o][g][i][y] for i in rows) for y in range(k)] for a in range(k)]
                columns = [sum(joint[a][y] for a in range(k)) for y in range(k)]
                tables[g] = floored_table([[joint[a][y] / columns[y] if columns[y] else 1 / k for y in range(k)] for a in range(k)])


# --- the released variant (METHODS, section 1): in torch scalars, for the gradient through its table


def released_terms(z, labels, num_classes, centroids=None, detach_table=False):
    """Terms of the authors' code for a list of M representations (n, D), float64: unit length, per class a centroid and an anti-centroid
    (the mean of all other samples), Q[a, b] = Σ_i s_a s_b / Σ_i s_b from the batch itself, minus V, averaged over classes.
    """
    n, found = len(labels), []
    if centroids is None:
        centroids = released_centroids(z, labels, num_classes)
    for j in range(len(z)):
        per_partner = []
        for other in range(len(z)):
            if other == j:
                continue
            total = 0
            for c in range(num_classes):
                mine, theirs = ([_two_way(z[s][i], centroids[s][c]) for i in range(n)] for s in (j, other))
                q = [[sum(mine[i][a] * theirs[i][b] for i in range(n)) / sum(theirs[i][b] for i in range(n)) for b in range(2)] for a in range(2)]
                if detach_table:
                    q = [[v.detach() for v in row] for row in q]
                total = total - sum(mine[i][a] * theirs[i][b] * torch.log(q[a][b]) for i in range(n) for a in range(2) for b in range(2)) / n
            per_partner.append(total / num_classes)
        found.append(sum(per_partner) / len(per_partner))
    return found


def released_centroids(z, labels, num_classes):
    "Per source and class: (mean of the others, mean of the class)."
    return [[[torch.stack([v for v, y in zip(s, labels, strict=True) if (y == c) == inside]).mean(0).detach() for inside in (False, True)]
             for c in range(num_classes)] for s in z]


def _two_way(z, pair):
    z = z / z.norm()
    distances = [(z - c / c.norm()).square().sum() for c in pair]
    weights = [torch.exp(-d) for d in distances]
    return [w / (weights[0] + weights[1]) for w in weights]
