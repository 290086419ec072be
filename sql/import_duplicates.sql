-- Logins that stand twice in one file, with the line of the first one.
select line, login, first
from (
    select line, login, min(line) over (partition by project_id, env, login) as first
    from pg_temp.import_rows
) as numbered
where line > first
order by line
limit 100
