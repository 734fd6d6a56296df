"""What each device's autocast does with each operation it knows: the cast lists, as data.

Source: ``ATen/autocast_mode.h`` (macros AT_FORALL_*) and ``autocast_mode.cpp`` of torch 2.11 and
2.13. They are the union: rms_norm joined CUDA's list after 2.11, and the overloads for named
dimensions are gone since, so ask the installed torch which of them it has. The tests hold the lists
against the kernels that it registers, against its header, and against the dtypes that come out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["CPU_LISTS", "CUDA_LISTS", "CastLists"]


def _ops(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True, kw_only=True)
class CastLists:
    """What a device's autocast does with each operation it knows (``name`` or ``name.overload``).

    An operation on no list runs in the dtype of its inputs.
    """

    lower: frozenset[str]
    """Inputs are cast to the 16-bit format; casts of fp32 weights are kept until autocast ends."""
    fp32: frozenset[str]
    """Inputs are cast to fp32."""
    fp32_set_opt_dtype: frozenset[str] = frozenset()
    """The operation is asked for an fp32 result, unless the caller asked for a dtype."""
    fp32_append_dtype: frozenset[str] = frozenset()
    """The same, through another overload, where this one takes no dtype."""
    promote: frozenset[str] = frozenset()
    """Inputs are cast to the widest dtype among them."""
    banned: frozenset[str] = frozenset()
    """Refused under autocast."""

    def rule_of(self, op: str) -> str | None:
        """Return the name of the list that holds `op`, None if no list does."""
        return next((f.name for f in fields(self) if op in getattr(self, f.name)), None)

    @property
    def ops(self) -> frozenset[str]:
        """All operations on any list."""
        return frozenset().union(*(getattr(self, f.name) for f in fields(self)))


CUDA_LISTS = CastLists(
    lower=_ops(
        """_convolution _convolution.deprecated convolution conv1d conv2d conv3d conv_tbc
        conv_transpose1d conv_transpose2d.input conv_transpose3d.input cudnn_convolution
        cudnn_convolution_transpose prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear
        addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
        _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
        _scaled_dot_product_flash_attention scaled_dot_product_attention"""
    ),
    fp32=_ops(
        """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
        pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm
        rms_norm group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity
        poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div
        l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
        soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
        dist pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d
        upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
        upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
        upsample_bicubic2d _upsample_bicubic2d_aa"""
    ),
    fp32_set_opt_dtype=_ops(
        """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
        linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
        prod.dim_Dimname softmax.Dimname log_softmax.Dimname cumprod.dimname cumsum.dimname
        sum.dim_DimnameList"""
    ),
    fp32_append_dtype=_ops("norm.Scalar norm.ScalarOpt_dim norm.names_ScalarOpt_dim"),
    promote=_ops(
        """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot
        scatter_add"""
    ),
    banned=_ops("binary_cross_entropy"),
)

CPU_LISTS = CastLists(
    lower=_ops(
        """conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding bmm mm linalg_vecdot
        baddbmm addmm _addmm_activation addbmm linear _convolution.deprecated matmul conv_tbc
        mkldnn_rnn_layer conv_transpose1d conv_transpose2d.input conv_transpose3d.input prelu
        scaled_dot_product_attention _native_multi_head_attention"""
    ),
    fp32=_ops(
        """avg_pool3d binary_cross_entropy grid_sampler polar prod prod.dim_int prod.dim_Dimname
        quantile quantile.scalar nanquantile nanquantile.scalar stft stft.center cdist
        grid_sampler_2d _grid_sampler_2d_cpu_fallback grid_sampler_3d trace view_as_complex cholesky
        cholesky_inverse cholesky_solve inverse lu_solve orgqr ormqr pinverse max_pool3d
        max_unpool2d max_unpool3d adaptive_avg_pool3d reflection_pad1d reflection_pad2d
        replication_pad1d replication_pad2d replication_pad3d mse_loss cosine_embedding_loss
        nll_loss nll_loss2d hinge_embedding_loss poisson_nll_loss smooth_l1_loss
        cross_entropy_loss l1_loss huber_loss margin_ranking_loss soft_margin_loss
        triplet_margin_loss multi_margin_loss ctc_loss.IntList ctc_loss.Tensor kl_div
        multilabel_margin_loss binary_cross_entropy_with_logits fft_fft fft_ifft fft_fft2 fft_ifft2
        fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_hfft
        fft_ihfft linalg_cond linalg_cond.p_str linalg_matrix_rank
        linalg_matrix_rank.tol_tensor linalg_matrix_rank.atol_rtol_tensor
        linalg_matrix_rank.atol_rtol_float linalg_solve linalg_cholesky linalg_svdvals
        linalg_eigvals linalg_eigvalsh linalg_inv linalg_householder_product linalg_tensorinv
        linalg_tensorsolve fake_quantize_per_tensor_affine geqrf _lu_with_info qr svd
        triangular_solve fractional_max_pool2d fractional_max_pool3d adaptive_max_pool3d
        multilabel_margin_loss_forward linalg_qr linalg_cholesky_ex linalg_svd linalg_eig
        linalg_eigh linalg_lstsq linalg_inv_ex"""
    ),
    promote=_ops("stack cat index_copy index_copy.dimname"),
)
