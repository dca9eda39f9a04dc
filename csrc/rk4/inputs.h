// What every device's binding of the Runge-Kutta sums does first: checks, contiguous inputs, the result, the arguments.
#pragma once

#include "common/bind.h"
#include "rk4/kernels.h"

namespace uz {

struct CombineCall {
  Tensor h, k1, k2, k3, k4, out;  // contiguous
  Rk4Combine args;
};

inline CombineCall combine_call(const Tensor& h, const Tensor& k1, const Tensor& k2, const Tensor& k3, const Tensor& k4,
                                double dt) {
  const char* where = "ultrazoo::rk4_combine";
  Arguments args(where, h);
  args.tensor("h", h, "...");
  args.tensor("k1", k1, "...");
  args.tensor("k2", k2, "...", k1.scalar_type());
  args.tensor("k3", k3, "...", k1.scalar_type());
  args.tensor("k4", k4, "...", k1.scalar_type());
  args.finite("dt", dt);
  CombineCall call = {torch::stable::contiguous(h),
                      torch::stable::contiguous(k1),
                      torch::stable::contiguous(k2),
                      torch::stable::contiguous(k3),
                      torch::stable::contiguous(k4),
                      empty_contiguous(h, h.scalar_type()),
                      {}};
  call.args = {
      .h = call.h.const_data_ptr(),
      .k1 = call.k1.const_data_ptr(),
      .k2 = call.k2.const_data_ptr(),
      .k3 = call.k3.const_data_ptr(),
      .k4 = call.k4.const_data_ptr(),
      .out = call.out.mutable_data_ptr(),
      .state = dtype_of(h, where),
      .slope = dtype_of(k1, where),
      .sixth = static_cast<float>(dt / 6),
  };
  return call;
}

struct StageCall {
  Tensor h, k, out;  // contiguous
  Rk4Stage args;
};

inline StageCall stage_call(const Tensor& h, const Tensor& k, double c) {
  const char* where = "ultrazoo::rk4_stage";
  Arguments args(where, h);
  args.tensor("h", h, "...");
  args.tensor("k", k, "...");
  args.finite("c", c);
  StageCall call = {
      torch::stable::contiguous(h), torch::stable::contiguous(k), empty_contiguous(h, h.scalar_type()), {}};
  call.args = {
      .h = call.h.const_data_ptr(),
      .k = call.k.const_data_ptr(),
      .out = call.out.mutable_data_ptr(),
      .state = dtype_of(h, where),
      .slope = dtype_of(k, where),
      .c = static_cast<float>(c),
  };
  return call;
}

}  // namespace uz
