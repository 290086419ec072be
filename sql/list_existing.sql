-- Which of these users there are.
--   $1 ids  uuid[]
select id
from users
where id = any($1::uuid[])
