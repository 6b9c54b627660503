// Every op of fbopt, once, with what it mutates. fbopt/_ops/reference.py states each equation in
// plain torch.
#include "stable_abi.h"

FBOPT_OPS(FBOPT_LIBRARY, m) {
  m.def("pack_(Tensor(a!) out, Tensor[] tensors) -> ()");
  m.def("squared_norm(Tensor[] tensors, bool stacked=False) -> Tensor");
  m.def(
      "perturb_(Tensor(a!) out, Tensor[] params, Tensor[] grads, float radius, "
      "Tensor? squared_norm=None) -> Tensor");
  m.def("adaptive_norms(Tensor[] params, Tensor[] grads, float eta) -> Tensor");
  m.def(
      "perturb_adaptive_(Tensor(a!) out, Tensor[] params, Tensor[] grads, float radius, float eta, "
      "Tensor squared_norm) -> ()");
  m.def("accumulate_(Tensor(a!)[] sums, Tensor[] grads, Tensor weight) -> ()");
  m.def(
      "accumulate_penalty_(Tensor(a!)[] sums, Tensor[] grads, Tensor[] plus, Tensor[] minus, "
      "Tensor weight, Tensor coefficient, Tensor squared_norm, float radius) -> ()");
  m.def(
      "accumulate_exact_(Tensor(a!)[] sums, Tensor(b!)[] carries, Tensor(c!) maxima, "
      "Tensor[] grads, Tensor weight, Tensor scales) -> ()");
  m.def(
      "accumulate_exact_penalty_(Tensor(a!)[] sums, Tensor(b!)[] carries, Tensor(c!) maxima, "
      "Tensor[] grads, Tensor[] plus, Tensor[] minus, Tensor weight, Tensor scales, "
      "Tensor coefficient, Tensor squared_norm, float radius) -> ()");
  m.def(
      "exact_mean_(Tensor(a!)[] means, Tensor[] sums, Tensor[] carries, Tensor maxima, "
      "Tensor scales, Tensor divisor) -> ()");
  m.def("clip_(Tensor(a!)[] grads, Tensor total_norm, float max_norm) -> ()");
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, Tensor "
      "lr, "
      "Tensor? divisor, Tensor? total_norm, float? max_norm, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, bool first) -> ()");
  m.def("row_products_(Tensor(a!) out, Tensor rows, Tensor a, Tensor b) -> ()");
  m.def("combine_rows_(Tensor(a!) out, Tensor rows, Tensor coefficients) -> ()");
}
