"""Madsen, Nielsen and Tingleff 2004, Algorithm 3.16, for a network of two layers; by the letter.

In their terms the matrix is JᵀJ and the loss half the sum of squares. Here it is the generalized
Gauss-Newton matrix JᵀHJ of any loss of the outputs (Schraudolph 2002), which for the mean squared
error is 2/n JᵀJ, so that all ratios are the same.
"""

import numpy as np


def parted(theta, inputs, units, outputs):
    """Kernel and bias of the hidden layer, and of the last."""
    ends = np.cumsum([inputs * units, units, units * outputs])
    one, two, three, four = np.split(theta, ends)
    return one.reshape(inputs, units), two, three.reshape(units, outputs), four


def outputs_and_jacobian(theta, x, units, outputs):
    """Of tanh and a linear layer: n × outputs, and n × outputs × weights."""
    kernel, bias, last, last_bias = parted(theta, x.shape[1], units, outputs)
    hidden = np.tanh(x @ kernel + bias)
    slopes = 1 - hidden**2
    rows = np.zeros((len(x), outputs, len(theta)))
    for i in range(len(x)):
        for k in range(outputs):
            towards = slopes[i] * last[:, k]
            into_last = np.zeros_like(last)
            into_last[:, k] = hidden[i]
            rows[i, k] = np.concatenate(
                [np.outer(x[i], towards).ravel(), towards, into_last.ravel(), np.eye(outputs)[k]]
            )
    return hidden @ last + last_bias, rows


def squares(z, y, weights):
    """The mean squared error, its gradient and its second derivatives by the outputs."""
    n, outputs = z.shape
    w = weights[:, None] / (n * outputs)
    blocks = np.einsum("n,kl->nkl", 2 * w[:, 0], np.eye(outputs))
    return np.sum(w * (z - y) ** 2), 2 * w * (z - y), blocks


def cross_entropy(z, y, weights):
    """Of one-hot targets and logits."""
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    w = weights / len(z)
    blocks = np.einsum("nk,kl->nkl", p, np.eye(z.shape[1])) - np.einsum("nk,nl->nkl", p, p)
    loss = -np.sum(w * np.sum(y * np.log(p), axis=1))
    return loss, w[:, None] * (p - y), np.einsum("n,nkl->nkl", w, blocks)


def path(theta, function, damping, count):
    """Weights, losses, λ and gain ratios after each iteration.

    Args:
        theta: Where it begins.
        function: Of the weights: the loss, its gradient and the Gauss-Newton matrix.
        damping: λ's first multiple of the largest diagonal entry.
        count: Iterations, each of which ends with a lower loss.
    """
    loss, gradient, matrix = function(theta)
    mu, nu = damping * np.max(np.diag(matrix)), 2.0
    found = []
    while len(found) < count:
        step = np.linalg.solve(matrix + mu * np.eye(len(theta)), -gradient)
        new_loss = function(theta + step)[0]
        ratio = (loss - new_loss) / (0.5 * step @ (mu * step - gradient))
        if new_loss < loss:
            theta = theta + step
            loss, gradient, matrix = function(theta)
            mu, nu = mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
            found.append((theta, loss, mu, ratio))
        else:
            mu, nu = mu * nu, 2 * nu
    return found
