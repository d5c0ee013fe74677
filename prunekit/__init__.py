"""Make trained vision-language and text models smaller and faster while keeping their quality."""
