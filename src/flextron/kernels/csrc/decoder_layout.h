// The layout of what the decoder's iteration is given.
#pragma once

#include "int8.h"
#include "layout.h"
#include "lora.h"

namespace {

inline std::string decoder_layout() {
    std::string text;
    text += describe_struct("Norm", sizeof(Norm), {FIELD(Norm, weight), FIELD(Norm, bias)});
    text += describe_struct("Linear", sizeof(Linear),
            {FIELD(Linear, weight), FIELD(Linear, bias), FIELD(Linear, scales), FIELD(Linear, group_scales),
             FIELD(Linear, column_scales), FIELD(Linear, panel_quads)});
    text += describe_struct("LayerWeights", sizeof(LayerWeights),
            {FIELD(LayerWeights, attention_norm), FIELD(LayerWeights, mlp_norm),
             FIELD(LayerWeights, attention_post_norm), FIELD(LayerWeights, mlp_post_norm), FIELD(LayerWeights, q),
             FIELD(LayerWeights, k), FIELD(LayerWeights, v), FIELD(LayerWeights, o), FIELD(LayerWeights, q_norm),
             FIELD(LayerWeights, k_norm), FIELD(LayerWeights, gate), FIELD(LayerWeights, up),
             FIELD(LayerWeights, down), FIELD(LayerWeights, window), FIELD(LayerWeights, query_scale)});
    text += describe_struct("Ends", sizeof(Ends),
            {FIELD(Ends, embedding), FIELD(Ends, positions), FIELD(Ends, final_norm), FIELD(Ends, head),
             FIELD(Ends, screen), FIELD(Ends, errors)});
    text += describe_struct("Shape", sizeof(Shape),
            {FIELD(Shape, hidden_size), FIELD(Shape, head_dim), FIELD(Shape, vocab_size), FIELD(Shape, num_layers),
             FIELD(Shape, rotated), FIELD(Shape, page_size), FIELD(Shape, query_rows_per_group),
             FIELD(Shape, is_multi_query), FIELD(Shape, parallel_residual), FIELD(Shape, is_layer_norm),
             FIELD(Shape, activation), FIELD(Shape, weights),
             FIELD(Shape, qk_norm_is_whole), FIELD(Shape, norm_eps), FIELD(Shape, embedding_scale),
             FIELD(Shape, residual_scale), FIELD(Shape, attention_cap), FIELD(Shape, logits_cap)});
    text += describe_struct("Tokens", sizeof(Tokens),
            {FIELD(Tokens, num_tokens), FIELD(Tokens, ids), FIELD(Tokens, positions), FIELD(Tokens, mlp_widths),
             FIELD(Tokens, num_groups), FIELD(Tokens, block_tables), FIELD(Tokens, table_rows), FIELD(Tokens, block_offsets),
             FIELD(Tokens, cos), FIELD(Tokens, sin), FIELD(Tokens, adapters), FIELD(Tokens, max_rank),
             FIELD(Tokens, cache), FIELD(Tokens, num_logits), FIELD(Tokens, rows), FIELD(Tokens, num_full),
             FIELD(Tokens, logits)});
    text += describe_struct("Bypass", sizeof(Bypass),
            {FIELD(Bypass, a), FIELD(Bypass, b), FIELD(Bypass, inputs), FIELD(Bypass, outputs), FIELD(Bypass, rank),
             FIELD(Bypass, scale)});
    text += describe_enum("Target", kTargets,
            {{"q", kQ}, {"k", kK}, {"v", kV}, {"o", kO}, {"gate", kGate}, {"up", kUp}, {"down", kDown}});
    text += describe_enum("Weights", kNumWeights, {{"float32", kFloat32}, {"int8", kInt8}, {"int4", kInt4}});
    text += describe_enum("Activation", kNumActivations,
            {{"silu", kSilu}, {"gelu", kGelu}, {"gelu_tanh", kGeluTanh}, {"relu", kRelu}});
    text += describe_constant("group", kGroup);
    text += describe_constant("panel_rows", kPanelRows);
    text += describe_constant("quad", kQuad);
    return text + describe_constant("lanes", kLanes);
}

}  // namespace
