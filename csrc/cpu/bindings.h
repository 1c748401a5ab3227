// The CPU kernels as functions on tensors, in the calling convention of the schemas in fastllm/ops/.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastllm::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

extern bool poison_fresh_memory;  // fill it with NaN; for tests

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                          MaybeTensor residual, MaybeTensor seed, double eps,
                                                          double dropout_p);
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight,
                                                          Tensor mean, Tensor rstd, MaybeTensor seed, double dropout_p,
                                                          bool has_bias, bool has_residual);
std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor residual, MaybeTensor seed,
                                                double eps, double weight_offset, double dropout_p);
std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight, Tensor rstd,
                                                MaybeTensor seed, double weight_offset, double dropout_p,
                                                bool has_residual);
Tensor layer_norm_plain(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps);
Tensor rms_norm_plain(Tensor x, MaybeTensor weight, double eps, double weight_offset);
Tensor softmax_fwd(Tensor x, MaybeTensor mask, double scale, bool causal, bool log);
Tensor softmax_bwd(Tensor dy, Tensor y, double scale, bool log);
Tensor linear_fwd(Tensor x, Tensor weight, MaybeTensor bias);
void linear_out(Tensor x, Tensor weight, MaybeTensor bias, Tensor out);
std::tuple<Tensor, Tensor> linear_act_fwd(Tensor x, Tensor weight, MaybeTensor bias, int64_t activation, bool needs_z);
void linear_bwd_out(Tensor dy, Tensor x, Tensor weight, MaybeTensor dx, MaybeTensor dweight, bool add);
std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor dy, Tensor x, Tensor weight, bool needs_dx, bool needs_dweight,
                                              bool needs_dbias);
std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor x, Tensor target, MaybeTensor weight, int64_t ignore_index,
                                                     int64_t reduction, double label_smoothing, double softcap,
                                                     double z_loss, bool accuracy);
Tensor cross_entropy_plain(Tensor x, Tensor target, int64_t ignore_index, int64_t reduction, double label_smoothing);
Tensor cross_entropy_bwd(Tensor dloss, Tensor x, Tensor target, MaybeTensor weight, Tensor lse, int64_t ignore_index,
                         int64_t reduction, double label_smoothing, double softcap, double z_loss);
Tensor cross_entropy_total(Tensor target, MaybeTensor weight, int64_t classes, int64_t ignore_index);
std::tuple<Tensor, Tensor> cross_entropy_rows(Tensor x, Tensor target, MaybeTensor weight, MaybeTensor total,
                                              MaybeTensor dloss, int64_t ignore_index, double label_smoothing,
                                              double softcap, double z_loss, bool accuracy);
Tensor swiglu_fwd(Tensor gate, MaybeTensor up);
std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dy, Tensor gate, MaybeTensor up);
Tensor geglu_fwd(Tensor gate, MaybeTensor up, bool tanh);
std::tuple<Tensor, Tensor> geglu_bwd(Tensor dy, Tensor gate, MaybeTensor up, bool tanh);
Tensor bias_act_fwd(Tensor x, MaybeTensor bias, int64_t activation);
std::tuple<Tensor, Tensor> bias_act_bwd(Tensor dy, Tensor x, MaybeTensor bias, int64_t activation, bool needs_dbias);
void adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps,
                double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize);
Tensor bias_gelu_fwd(Tensor x, MaybeTensor bias, bool tanh);
std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy, Tensor x, MaybeTensor bias, bool tanh);
std::tuple<Tensor, Tensor> rope_fwd(Tensor q, MaybeTensor k, Tensor cos, Tensor sin, MaybeTensor offsets,
                                    MaybeTensor cu_seqlens, int64_t offset, bool interleaved, bool whole, bool inverse);
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor bias,
                                         MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale,
                                         double softcap, int64_t q_offset, int64_t window_left, int64_t window_right,
                                         double dropout_p);
Tensor attention_plain(Tensor q, Tensor k, Tensor v, double scale, int64_t q_offset, int64_t window_left,
                       int64_t window_right);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor grad_o, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, MaybeTensor mask,
    MaybeTensor bias, MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale, double softcap,
    int64_t q_offset, int64_t window_left, int64_t window_right, double dropout_p, bool bias_grad, bool partial);

std::tuple<Tensor, Tensor> attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed,
                                                double scale, double softcap, std::optional<int64_t> q_offset,
                                                int64_t window_left, int64_t window_right, double dropout_p);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_bwd(
    Tensor grad_o, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens_q,
    Tensor cu_seqlens_k, MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale, double softcap,
    std::optional<int64_t> q_offset, int64_t window_left, int64_t window_right, double dropout_p);

double multiply_adds(int64_t rounds, bool bf16);  // of all threads; how many operations that was

Tensor weight_only_linear_fwd(Tensor x, Tensor weight, MaybeTensor bias);
Tensor quantized_linear_fwd(Tensor x, Tensor codes, Tensor scales, MaybeTensor offsets, MaybeTensor bias, int64_t rows,
                            int64_t bits, int64_t group);
Tensor quantized_linear_bwd(Tensor dy, Tensor codes, Tensor scales, MaybeTensor offsets, int64_t columns, int64_t bits,
                            int64_t group);
Tensor dequantize_fwd(Tensor codes, Tensor scales, MaybeTensor offsets, Tensor like, int64_t begin, int64_t end,
                      int64_t rows, int64_t columns, int64_t bits, int64_t group);

// Writes k_new and v_new into the caches.
std::tuple<Tensor, Tensor> attention_kvcache_fwd(Tensor q, Tensor k_cache, Tensor v_cache, MaybeTensor k_new,
                                                 MaybeTensor v_new, Tensor cache_seqlens, MaybeTensor block_table,
                                                 MaybeTensor cos, MaybeTensor sin, bool rope_interleaved,
                                                 MaybeTensor mask, MaybeTensor bias, MaybeTensor alibi_slopes,
                                                 MaybeTensor sink, double scale, double softcap,
                                                 std::optional<int64_t> q_offset, int64_t window_left,
                                                 int64_t window_right);

}  // namespace fastllm::cpu
