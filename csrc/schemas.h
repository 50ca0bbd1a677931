// Every op schema of mmkernels, in one place: the CPU library defines them in the namespace mmkernels, the emulator
// library in mmkernels_emulator. Implementations: csrc/<family>/<family>_cpu.cpp and csrc/<family>/<family>_cuda.cpp.
//
// Gradients that `wanted` does not ask for come back as empty tensors, so the arity is fixed.
#pragma once

namespace mmk {

template <class Library>
void define_schemas(Library& m) {
  // q (B,H,N,D)  k (B,H,M,D)  v (B,H,M,E)  key_mask bool (B,M)  bias broadcastable to (B,H,N,M)  seed int64 (1)
  // Or bias float32 (G,N,C), contiguous, diagonal blocks: the scores of n and m with n / C == m / C have bias[g, n, m %
  // C] of the example's group g, which bias_index int64 (B) holds; without that every example has its own, G = B.
  // -> out (B,H,N,E) of q's dtype, lse float32 (B,H,N), -inf for rows with no key.
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, Tensor? bias_index, Tensor? seed, "
      "float scale, float dropout_p) -> (Tensor, Tensor)");
  // wanted: 1 dq, 2 dk and dv, 4 dbias (of bias's own shape; not for one that is broadcast over M, whose gradient is
  // that of lse).
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? key_mask, Tensor? bias, Tensor? bias_index, Tensor? seed, float scale, float dropout_p, int wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // Problems of unequal lengths in one launch, each with one or two segments of queries and of keys, which lie behind
  // each other without being joined. attention/attention_list.h has the contract.
  // -> for every problem one out (B,T,H,E) for each segment of its queries, in order; one lse float32 (B,H,N) a
  // problem.
  m.def(
      "attention_list_fwd(Tensor[] tensors, int[] problems, Tensor[] key_masks, Tensor? seed, float scale, "
      "float dropout_p) -> (Tensor[], Tensor[])");
  // dout as out; dlse as lse, or an empty list. wanted: a flag for each of `tensors`. -> a gradient for each of them.
  m.def(
      "attention_list_bwd(Tensor[] dout, Tensor[] dlse, Tensor[] tensors, int[] problems, Tensor[] key_masks, "
      "Tensor[] out, Tensor[] lse, Tensor? seed, float scale, float dropout_p, int[] wanted) -> Tensor[]");
  // q (B|1,R,C): absorbed queries, the rows of all heads one after another.  x (B,M,Cx)  position (M,C-Cx)
  // key_mask bool (B,M).  xhat = LayerNorm without affine over [x ; position] (eps < 0: no norm).
  // -> out (B,R,C) = softmax(scale q xhat^T) xhat and lse (B,R), both float32: what the backward subtracts from dP is a
  // sum over out, and rounding it to 16 bits would cost the queries' gradient as much as all else together.
  // With dropout_p > 0 the weights of softmax are dropped by counter (seed int64 (1), row b R + r, key first_key + m),
  // and out is (B,R,C+1): its last channel is the sum of a row's weights, which constants of the values are to be
  // multiplied by. first_key: how many keys of a longer input, of which x is a part, come before it.
  m.def(
      "latent_fwd(Tensor q, Tensor x, Tensor? position, Tensor? key_mask, float scale, float eps, Tensor? seed=None, "
      "float dropout_p=0.0, int first_key=0) -> (Tensor, Tensor)");
  // dout float32. wanted: 1 dq, 2 dx, 4 dposition. dq has q's shape (summed over the batch where q is shared).
  m.def(
      "latent_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor x, Tensor? position, Tensor? key_mask, Tensor out, "
      "Tensor lse, float scale, float eps, int wanted, Tensor? seed=None, float dropout_p=0.0, "
      "int first_key=0) -> (Tensor, Tensor, Tensor)");
  // The whole forward with absorbed projections, for inference on a CPU: arguments as mmkernels.ops.latent_attention.
  // Without w_k, q is absorbed already: per head (q w_k) norm_weight, (B|1,H*N,C).
  m.def(
      "latent_attention(Tensor q, Tensor x, Tensor? w_k, Tensor w_v, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? b_v, Tensor? position, Tensor? key_mask, int num_heads, float scale, float eps) -> Tensor");
  // Many queries that read few keys: out = sum_h softmax(scale (xhat k_h^T + bias_h)) v_h + out_bias, xhat as above of
  // [queries ; position]. queries (B|1,O,Cx)  position (O,C-Cx)  query_mask bool (B,O): where it hides a query,
  // out_bias alone  k (B,H,M,C)  bias float32 (B,H,M)  v (B,H,M,E)  out_bias (E)  key_mask bool (B,M)
  // -> out (B,O,E) of queries' dtype, lse float32 (B,H,O), that of a hidden query any number.
  m.def(
      "latent_decode_fwd(Tensor queries, Tensor? position, Tensor? query_mask, Tensor k, Tensor bias, Tensor v, "
      "Tensor? out_bias, Tensor? key_mask, float scale, float eps) -> (Tensor, Tensor)");
  // wanted: 1 dqueries, 2 dposition, 4 dk, dbias and dv, in this order. Those of what examples share are summed.
  m.def(
      "latent_decode_bwd(Tensor dout, Tensor queries, Tensor? position, Tensor? query_mask, Tensor k, Tensor bias, "
      "Tensor v, Tensor? out_bias, Tensor? key_mask, Tensor out, Tensor lse, float scale, float eps, int wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x: one or two (B,T_i,C), one behind the other  residual (B,T,C)  residual_bias (C)  gain, bias (C) or (G,C); these
  // three of x's dtype or float32. Example b has the row index[b] of (G,C), index int64 (B), or without it b, G = B.
  // s = x + residual + residual_bias.
  // -> out (B,T,C) = LayerNorm(s) and sum = s of x's dtype (without a residual (0)), mean and rstd float32 (B,T).
  m.def(
      "norm_fwd(Tensor[] x, Tensor? residual, Tensor? residual_bias, Tensor? gain, Tensor? bias, Tensor? index, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  // rows: [sum], or x where there was no residual. wanted: 1 dx, 2 dgain, 4 dbias, 8 dresidual_bias, 16: bias is (G,C).
  // -> dx (B,T,C), which is the gradient of the residual too; dgain and dbias as gain and bias, dresidual_bias (C), all
  // three float32.
  m.def(
      "norm_bwd(Tensor dout, Tensor? dsum, Tensor[] rows, Tensor mean, Tensor rstd, Tensor? gain, Tensor? index, "
      "SymInt groups, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  // x (...,C)  bias (C) of x's dtype or float32 -> gelu(x + bias), by tanh or by erf.
  m.def("bias_gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor");
  // wanted: 1 dx, 2 dbias, which is float32.
  m.def("bias_gelu_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh, int wanted) -> (Tensor, Tensor)");
  // Linear layers in one pass over the threads, on a CPU: x (M_i,K_i)  weight (N_i,K_i)  bias (N_i), of x's dtype or
  // float32, or empty -> (M_i,N_i) each.
  m.def("linear_fwd(Tensor[] x, Tensor[] weight, Tensor[] bias) -> Tensor[]");
  // wanted, of each: 1 dx, 2 dweight, 4 dbias, which is float32. -> dx, dweight, dbias of the first, of the second, ...
  m.def("linear_bwd(Tensor[] dout, Tensor[] x, Tensor[] weight, int[] wanted) -> Tensor[]");
  // y[m, n] = sum_k (rho + gate[g(m), k R / in, n C / out]) a(x)[m, k] weight[n, k] + bias[n], rho: 1 with residual,
  // else 0. x (M,in)  weight (out,in) and bias (out) of x's dtype  gate (G,R,C) of x's dtype or float32  index int64 (M
  // / rows_per_gate).  Row m has the number j = m / rows_per_gate and the gate index[j]; without index gate j, or 0
  // where there is one gate only (without rows rows_per_gate may be 0).  a: activation (0 none, 1 relu, 2 gelu by erf,
  // 3 gelu by tanh), then dropout by counter with row m and key k of common/dropout.h and seed int64 (1), which is
  // absent without dropout. -> y (M,out) of x's dtype.
  m.def(
      "hypergrid_fwd(Tensor x, Tensor weight, Tensor gate, Tensor? bias, Tensor? index, SymInt rows_per_gate, "
      "bool residual, int activation, float dropout_p, Tensor? seed) -> Tensor");
  // -> dx and dweight of x's dtype, dgate (as gate) and dbias float32; (0) where not wanted.
  m.def(
      "hypergrid_bwd(Tensor dy, Tensor x, Tensor weight, Tensor gate, Tensor? index, SymInt rows_per_gate, "
      "bool residual, int activation, float dropout_p, Tensor? seed, bool want_x, bool want_weight, bool want_gate, "
      "bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  // row (G|1,R)  column (G|1,C) of its dtype -> sigmoid(row column^T) (G,R,C) of that dtype.
  m.def("hypergrid_gate_fwd(Tensor row, Tensor column) -> Tensor");
  // -> drow and dcolumn, as row and column, float32.
  m.def("hypergrid_gate_bwd(Tensor dgate, Tensor row, Tensor column) -> (Tensor, Tensor)");
  // Adapters with the norms and residuals around them. x, input_residual, residual (B,T,C) of one dtype  w_down (r,C)
  // and w_up (C,r) of that dtype, or banks (A,r,C) and (A,C,r)  b_down (r) or (A,r), b_up (C) or (A,C), norm_weight,
  // norm_bias, out_weight, out_bias (C), scale (1 or A, 1 or C), gate (B) or (B,T): of x's dtype or float32  index
  // int64 (B) or (B,T), with a bank alone: numbers of adapters, -1 for none  seed int64 (1), absent without dropout.
  //   s = x + input_residual   u = LayerNorm(s) with norm_weight, else s
  //   o = dropout(gate factor scale (act(u w_down^T + b_down) w_up^T + b_up)), 0 where the index is -1
  //   y = o + residual + (skip & 1) x + (skip & 2) input_residual + (skip & 4) u
  //   out = LayerNorm(y) with out_weight, else y
  // activation: 0 none, 1 relu, 2 gelu by erf, 3 gelu by tanh, 4 swish, 5 leaky relu (0.01), 6 tanh.  dropout: that of
  // common/dropout.h with row b T + t and key c.  (skip & 2) only with input_residual, (skip & 4) only with
  // norm_weight.
  // -> out (B,T,C) of x's dtype, statistics float32 (2 n,B,T): mean and rstd of s, if it is normalised, then of y, and
  // with `save`, which only a CPU takes, float32 (B,T,r) what act is applied to, in float32 with out_weight (B,T,r+C)
  // with y behind it; else (0).
  m.def(
      "adapter_fwd(Tensor x, Tensor? input_residual, Tensor? residual, Tensor w_down, Tensor? b_down, Tensor w_up, "
      "Tensor? b_up, Tensor? norm_weight, Tensor? norm_bias, Tensor? out_weight, Tensor? out_bias, Tensor? scale, "
      "Tensor? gate, Tensor? index, Tensor? seed, int skip, int activation, float eps, float out_eps, float factor, "
      "float dropout_p, bool save) -> (Tensor, Tensor, Tensor)");
  // -> gradients of the first 13 arguments, in their order and shapes: of rows and weights in x's dtype, the others
  // float32; (0) where bit i of `wanted` is not set. That of the residual is that of y. Bits of what is absent are 0.
  // saved: what the forward saved, or absent; a GPU makes it again in any case.
  m.def(
      "adapter_bwd(Tensor dout, Tensor x, Tensor? input_residual, Tensor? residual, Tensor w_down, Tensor? b_down, "
      "Tensor w_up, Tensor? b_up, Tensor? norm_weight, Tensor? norm_bias, Tensor? out_weight, Tensor? out_bias, "
      "Tensor? scale, Tensor? gate, Tensor? index, Tensor? seed, Tensor statistics, Tensor? saved, int skip, "
      "int activation, float eps, float out_eps, float factor, float dropout_p, int wanted) -> (Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // query (B,T,C)  outputs (B,T,A,C), A of 1 or more  offset (B,T), of query's dtype  seed int64 (1), absent without
  // dropout. p = softmax over a of scale dropout(query . outputs[a] + offset), that of common/dropout.h with row b T +
  // t and key a: a score that it drops is 0. (Without dropout the offset changes nothing, and is not looked at.)
  // -> out (B,T,C) = sum over a of p[a] outputs[a], of query's dtype, and weights p float32 (B,T,A).
  m.def(
      "adapter_fusion_fwd(Tensor query, Tensor outputs, Tensor? offset, Tensor? seed, float scale, float dropout_p) -> "
      "(Tensor, Tensor)");
  // wanted: 1 dquery, 2 doutputs, 4 doffset. -> these, of query's dtype.
  m.def(
      "adapter_fusion_bwd(Tensor dout, Tensor query, Tensor outputs, Tensor weights, Tensor? seed, float scale, "
      "float dropout_p, int wanted) -> (Tensor, Tensor, Tensor)");
}

}  // namespace mmk
