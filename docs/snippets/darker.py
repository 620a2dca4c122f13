from pdiff_hf import Fields, ImageFamily


class Darker(ImageFamily):
    fields = Fields({"gamma": {"type": "scalar", "low": 1.0, "high": 4.0}})

    def change(self, conditions, images, labels):  # images: (tasks, examples, C, H, W), from 0 to 1
        return images ** conditions.over(images).gamma, labels
