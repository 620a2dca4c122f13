from pdiff_hf.pipelines.pipeline_pdiff import PDiffPipeline, PDiffPipelineOutput

__all__ = ["PDiffPipeline", "PDiffPipelineOutput"]
